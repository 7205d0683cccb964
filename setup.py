from setuptools import find_packages, setup

# pyproject.toml maps vidcompress.patches to patches/ and vidcompress.configs to configs/, but cannot both find packages
# and add these two; an explicit list there would drop every new sub-package from the wheel without a word.
setup(packages=[*find_packages(include=["vidcompress", "vidcompress.*"]), "vidcompress.patches", "vidcompress.configs"])
