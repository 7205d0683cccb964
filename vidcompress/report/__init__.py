"""Pictures of what a compression did to one video: a page for a browser, a picture for a paper. Needs the extra [viz].

    report = collect(model, processor, video, "What happens?", choose("infomerge@0.1,infomerge@0.02"))
    write_page(report, "report.html")
    write_picture(report, "picture.png")

Everything that is drawn comes from the `Trace`.
"""

from vidcompress.report.collect import Choice, Report, Side, choose, collect
from vidcompress.report.page import render, write_page
from vidcompress.report.picture import write_picture
from vidcompress.report.tokens import TokenMap

__all__ = ["Choice", "Report", "Side", "TokenMap", "choose", "collect", "render", "write_page", "write_picture"]
