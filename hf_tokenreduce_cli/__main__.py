"""Run `python -m hf_tokenreduce_cli`. `accelerate launch -m hf_tokenreduce_cli` runs it in several processes."""

from . import main


main()
