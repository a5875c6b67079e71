"""Print the table of methods: `python -m hf_tokenreduce.methods`. With a folder of documentation, such as `docs`, also
write the pages there."""

import sys

from .table import methods_table, write_pages


print(methods_table())
for folder in sys.argv[1:]:
    write_pages(folder)
