"""Protected merging, described."""

from ..modeling.protected import ProtectedConfig
from .method import Method, by_keep_rate


PROTECTED = Method(
    ProtectedConfig,
    title="Protected",
    family="merging and pruning, our own",
    summary=(
        "Protected merging is our own method. In some layers the important tokens stay as they are. Of the others, "
        "similar ones merge and the least important ones are dropped."
    ),
    details=(
        "The importance of a patch token is the attention of the class token to it times the length of its value, in "
        "each head, summed over the heads. The share `protect_share` of the highest importance is protected. Of the "
        "tokens that a layer removes, the share `drop_share` of the lowest importance is dropped. "
        "Every second of the tokens between is a source; the sources whose hidden state is most like that of another "
        "token go into it, protected ones too. The new token is the mean, weighted by size, and attention adds the "
        "logarithm of a token's size to its logits (`prop_attn`)."
    ),
    limits=(
        "An encoder without a class token is scored by the attention of the mean token. Dropped patches cannot be put "
        "back on the grid; with `drop_share` 0 there are none unless a layer removes more than can merge."
    ),
    ours="all of it. Its defaults were chosen on one half of the photographs, and the other half tells what it loses",
    at_share=by_keep_rate(ProtectedConfig, 3, 5, 7, 9),
    keep_rate_may_change=True,
)
