"""`python -m hf_tokenreduce_cli`, and by `accelerate launch -m` in several processes."""

from . import main


main()
