"""What a card says of each method."""

from typing import NamedTuple


class Method(NamedTuple):
    """adaptive: whether images differ in how many tokens they keep. arxiv: None where there is none."""

    name: str
    text: str
    paper: str | None
    arxiv: str | None
    adaptive: bool = False


METHODS: dict[str | None, Method] = {
    None: Method("dense", "Nothing is reduced: every token goes through every layer.", None, None),
    "tome": Method(
        "ToMe",
        "In every layer, between attention and MLP, the most similar pairs of tokens are merged into their mean. A "
        "token that stands for several patches counts as that many in attention.",
        "Token Merging: Your ViT But Faster",
        "2210.09461",
    ),
    "evit": Method(
        "EViT",
        "In some layers the patch tokens that the class token attends to least are taken out. Their sum, weighted by "
        "that attention, stays as one token.",
        "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        "2202.07800",
    ),
    "topk": Method(
        "Top-K",
        "In some layers only the patch tokens stay that the class token attends to most. The others are dropped, "
        "without the fused token of EViT.",
        None,
        None,
    ),
    "bat": Method(
        "BAT",
        "In some layers the tokens that the class token attends to little are clustered, and among those that it "
        "attends to much the most similar are fused. So what is kept is both important and diverse.",
        "Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision Transformers",
        "2211.11315",
    ),
    "ats": Method(
        "ATS",
        "Inside the attention of some layers tokens are sampled by how much the class token attends to them. Every "
        "image keeps as many as its scores are spread over.",
        "Adaptive Token Sampling for Efficient Vision Transformers",
        "2111.15667",
        adaptive=True,
    ),
    "ltmp": Method(
        "LTMP",
        "In every layer tokens merge whose similarity is above one learned threshold, and those are pruned whose "
        "importance is below another. Every image keeps as many as pass. The settings hold the thresholds it starts "
        "from; the learned ones, two per layer, are with the weights.",
        "Learned Thresholds Token Merging and Pruning for Vision Transformers",
        "2307.10780",
        adaptive=True,
    ),
    "sit": Method(
        "SiT",
        "After some layers a small network weighs the patch tokens into fewer ones. The mixtures are soft and were "
        "learned.",
        "Self-slimmed Vision Transformer",
        "2111.12624",
    ),
    "dlvit": Method(
        "DL-ViT",
        "Before the first layer a small network judges every embedded patch. Those that do not matter never enter the "
        "encoder.",
        "Predicting Token Impact Towards Efficient Vision Transformer",
        "2305.14840",
        adaptive=True,
    ),
}
