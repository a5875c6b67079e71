"""The description of protected merging."""

from ..modeling.protected import ProtectedConfig
from .method import Method, by_keep_rate


PROTECTED = Method(
    ProtectedConfig,
    title="Protected",
    family="merging and pruning, our own",
    summary=(
        "Protected merging is our own method. In some layers the important tokens stay as they are. Of the other "
        "tokens, similar ones merge and the least important ones are dropped."
    ),
    details=(
        "The importance of a patch token is the attention of the class token to it times the length of its value, in "
        "each head, summed over the heads. A share `protect_share` of the tokens, those of the highest importance, is "
        "protected. Of the tokens that a layer removes, a share `drop_share`, those of the lowest importance, is "
        "dropped. Every second one of the tokens between is a source. The sources whose hidden state is most like "
        "that of another token merge into it; that token may be a protected one. The new token is the mean, weighted "
        "by size, and attention adds the logarithm of a token's size to its logits (`prop_attn`)."
    ),
    limits=(
        "In an encoder without a class token (SigLIP, I-JEPA), the attention of the mean of all tokens gives the "
        "scores. No token holds a dropped patch any more. With `drop_share` 0 no patch is dropped, unless a layer "
        "removes more tokens than can merge."
    ),
    ours=(
        "everything; its defaults were chosen on one half of the photographs, and its loss of accuracy was measured "
        "on the other half"
    ),
    at_share=by_keep_rate(ProtectedConfig, 3, 5, 7, 9),
    keep_rate_may_change=True,
)
