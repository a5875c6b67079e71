"""Print the table of methods: `python -m hf_tokenreduce.methods`. If a folder such as `docs` is given, also write the
methods' pages of the documentation there."""

import sys

from .table import methods_table, write_pages


print(methods_table())
for folder in sys.argv[1:]:
    write_pages(folder)
