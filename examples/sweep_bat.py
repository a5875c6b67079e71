"""How BAT best splits what it keeps into attentive tokens, fused ones and clusters: top-1 without training.

    python examples/sweep_bat.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGE_FOLDER --output_dir FOLDER

For every keep rate, all pairs of a cluster share and a fuse share; beside them Top-K and EViT, which hand on the same
number of tokens (EViT one more, its fused one). Every result is written down at once, and what is written down is not
computed again: a run that was stopped goes on where it was. 1,000 images of 224 pixels take about 10 seconds a cell
with a tiny model on two cores. Ends with `bat_sweep_<model>.md` in the folder.
"""

import argparse
import json
from pathlib import Path

from measure_accuracy import add_arguments, load, measure
from transformers.utils import logging

from hf_tokenreduce import BATConfig, EViTConfig, TopKConfig, reduce_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--keep_rates", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--cluster_shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.6])
    parser.add_argument("--fuse_shares", type=float, nargs="+", default=[0.0, 0.2, 0.5, 0.8])
    parser.add_argument("--no_prop_attn", action="store_true")
    args = parser.parse_args()
    logging.disable_progress_bar()

    model, data = load(args)
    settings = {}
    for rate in args.keep_rates:
        settings |= {(rate, "topk"): TopKConfig(keep_rate=rate), (rate, "evit"): EViTConfig(keep_rate=rate)}
        for clusters in args.cluster_shares:
            for fused in args.fuse_shares:
                settings[rate, clusters, fused] = BATConfig(
                    keep_rate=rate, cluster_share=clusters, fuse_share=fused, prop_attn=not args.no_prop_attn
                )
    name = Path(args.model_name_or_path).name + ("_no_prop_attn" if args.no_prop_attn else "")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = args.output_dir / f"bat_sweep_{name}.jsonl"
    done = dict(json.loads(line) for line in record.read_text().splitlines()) if record.is_file() else {}
    for number, setting in enumerate(settings.values(), start=1):
        key = json.dumps(setting.to_dict())
        if key not in done:
            done[key] = measure(reduce_tokens(model, setting).eval(), data, args.batch_size)._asdict()
            with record.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
            print(f"{number} of {len(settings)}: {key} {done[key]['top1']:.1f}", flush=True)

    lines = [f"# BAT without training: {name}, {len(data.labels)} images, top-1 %", ""]
    for rate in args.keep_rates:
        top1 = {key: done[json.dumps(s.to_dict())]["top1"] for key, s in settings.items() if key[0] == rate}
        lines += [f"keep rate {rate}: Top-K {top1[rate, 'topk']:.1f}, EViT {top1[rate, 'evit']:.1f}", ""]
        lines.append("| cluster share | " + " | ".join(f"fuse share {fused}" for fused in args.fuse_shares) + " |")
        lines.append("|---" * (1 + len(args.fuse_shares)) + "|")
        for clusters in args.cluster_shares:
            row = " | ".join(f"{top1[rate, clusters, fused]:.1f}" for fused in args.fuse_shares)
            lines.append(f"| {clusters} | {row} |")
        lines.append("")
    (args.output_dir / f"bat_sweep_{name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
