"""Find how BAT best splits the tokens it keeps into attentive tokens, fused tokens and clusters, without training.

    python benchmarks/sweep_bat.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGE_FOLDER --output_dir FOLDER

For every keep rate, the table shows top-1 of all pairs of a cluster share and a fuse share. Beside them it shows Top-K
and EViT, which keep the same number of tokens (EViT keeps one more, its fused token). A run that was stopped goes on
where it stopped. 1,000 images of 224 pixels take about 20 seconds per cell with a tiny model on two cores. The result
is `bat_sweep_<model>.md` in the output folder.
"""

import argparse
from pathlib import Path

from hf_tokenreduce import BATConfig, EViTConfig, TopKConfig
from hf_tokenreduce.evaluation import compare
from hf_tokenreduce.loading import load_images, load_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--data_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--keep_rates", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="Keep rates of BAT.")
    parser.add_argument(
        "--cluster_shares",
        type=float,
        nargs="+",
        default=[0.0, 0.2, 0.3, 0.4],
        help="Shares of the kept tokens that are clusters of inattentive tokens.",
    )
    parser.add_argument(
        "--fuse_shares",
        type=float,
        nargs="+",
        default=[0.2, 0.5, 0.8],
        help="Numbers of attentive tokens that are fused away, as shares of those that remain.",
    )
    parser.add_argument("--no_prop_attn", action="store_true", help="Turn proportional attention off.")
    args = parser.parse_args(arguments)

    model, processor = load_model(args.model_name_or_path, args.model_revision)
    settings = {}
    for rate in args.keep_rates:
        settings |= {(rate, "topk"): TopKConfig(keep_rate=rate), (rate, "evit"): EViTConfig(keep_rate=rate)}
        for clusters in args.cluster_shares:
            for fused in args.fuse_shares:
                settings[rate, clusters, fused] = BATConfig(
                    keep_rate=rate, cluster_share=clusters, fuse_share=fused, prop_attn=not args.no_prop_attn
                )
    images = load_images(args.data_dir)
    name = Path(args.model_name_or_path).name + ("_no_prop_attn" if args.no_prop_attn else "")
    found = compare(model, images, processor, list(settings.values()), output_dir=args.output_dir / name, speed=False)
    top1 = {key: row["top1"] for key, row in zip(settings, found.rows[1:], strict=True)}

    lines = [f"# BAT without training: {name}, {len(images)} images, top-1 %", ""]
    lines += ["By `benchmarks/sweep_bat.py`" + (" `--no_prop_attn`." if args.no_prop_attn else "."), ""]
    for rate in args.keep_rates:
        lines += [f"keep rate {rate}: Top-K {top1[rate, 'topk']:.1f}, EViT {top1[rate, 'evit']:.1f}", ""]
        lines.append("| cluster share | " + " | ".join(f"fuse share {fused}" for fused in args.fuse_shares) + " |")
        lines.append("|---" * (1 + len(args.fuse_shares)) + "|")
        for clusters in args.cluster_shares:
            row = " | ".join(f"{top1[rate, clusters, fused]:.1f}" for fused in args.fuse_shares)
            lines.append(f"| {clusters} | {row} |")
        lines.append("")
    table = "\n".join(lines)
    (args.output_dir / f"bat_sweep_{name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
