"""Times every method on synthetic tokens: `vidcompress bench`, beside the other benchmarks.

python scripts/bench_methods.py                                            # 32x14x14x3584, all methods
python scripts/bench_methods.py --grids 32x14x14,64x13x13,128x14x14,256x14x14 --out bench.json --plot bench.png
"""

from __future__ import annotations

import sys

from vidcompress.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
