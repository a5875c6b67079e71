"""What `make release-check` does with the installed wheel: it reduces a tiny model, saves it and checks the folder.

python tests/use_wheel.py DIST
"""

import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging

import hf_tokenreduce
from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.hub import check_folder, write_card


PACKAGE = Path(hf_tokenreduce.__file__).parent
WANTED = ("py.typed", "hub/card_template.md", "hub/released_code.json", "modeling/version.py")
IN_SDIST = (
    "tests/test_package.py",
    "tests/parity/model_seed1.safetensors",
    "docs/methods.md",
    "docs/images/methods.png",
    "examples/add_a_method.py",
    "constraints.txt",
    "constraints-oldest.txt",
    "Makefile",
    "CHANGELOG.md",
)


def main(dist: Path) -> None:
    logging.disable_progress_bar()
    assert "site-packages" in PACKAGE.parts, f"{PACKAGE} is not the installed wheel."
    missing = [name for name in WANTED if not (PACKAGE / name).is_file()]
    assert not missing, f"The wheel lacks {missing}."
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    missing = [name for name in IN_SDIST if name not in names]
    assert not missing, f"The sdist lacks {missing}."
    with zipfile.ZipFile(wheel) as archive:
        others = {name.split("/")[0] for name in archive.namelist()}
    version = hf_tokenreduce.__version__
    assert others == {"hf_tokenreduce", "hf_tokenreduce_cli", f"hf_tokenreduce-{version}.dist-info"}, others

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 4}
    stock = ViTForImageClassification(ViTConfig(num_hidden_layers=3, num_labels=3, **sizes)).eval()
    reduced = reduce_tokens(stock, ToMeConfig(r=8))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = reduced(images)
    assert found.token_counts[0].tolist()[0] == 57, found.token_counts  # of 64 patches and the class token
    with tempfile.TemporaryDirectory() as folder:
        reduced.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        write_card(folder)
        loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, found.logits)
        report = check_folder(folder)
        report.raise_for_errors()
        assert report.code_version == version == loaded.config.hf_tokenreduce_version
    for file in (wheel, sdist):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    print(f"hf_tokenreduce {version}: the wheel works.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
