"""The table of methods, as the documentation shows it: `python -m hf_tokenreduce.methods`."""

from .table import methods_table


print(methods_table())
