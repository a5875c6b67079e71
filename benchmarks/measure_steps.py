"""Measure what a training step of the adaptive methods costs, beside a dense forward and backward of the same batch.

    python benchmarks/measure_steps.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGES

LTMP masks tokens during training, so it saves no time; ATS really drops them. The table shows medians of steps that
are measured in turn.
"""

import argparse
import copy
import statistics
import time

import torch

from hf_tokenreduce import ATSConfig, LTMPConfig, calibrate, reduce_tokens
from hf_tokenreduce.loading import load_model, load_pictures
from hf_tokenreduce.modeling.encoders import encoder_of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--data_dir", required=True, help="Folder of images.")
    parser.add_argument("--batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--repeats", type=int, default=9, help="Number of timed steps of each model.")
    args = parser.parse_args(arguments)

    dense, processor = load_model(args.model_name_or_path, args.model_revision)
    pixels = processor(load_pictures([args.data_dir], args.batch_size)[0], return_tensors="pt")["pixel_values"]
    labels = torch.arange(len(pixels)) % dense.config.num_labels
    settings = {"dense": None, "ATS": ATSConfig(), "LTMP": LTMPConfig(), "LTMP, frozen backbone": LTMPConfig()}
    models = {name: copy.deepcopy(dense) for name in settings}
    for name, setting in settings.items():
        if setting is not None:
            models[name] = reduce_tokens(models[name], setting)
    for name, model in models.items():
        if "LTMP" in name:
            calibrate(model, pixels, 0.65)
        if "frozen" in name:
            model.requires_grad_(False)
            for reducer in encoder_of(model).reducers:
                reducer.requires_grad_(True)
        model.train()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model(pixels, labels=labels).loss.backward()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
            model.zero_grad()
    print(
        f"Batch {len(pixels)}, {torch.get_num_threads()} threads, medians of {args.repeats} steps, measured in turn.\n"
    )
    print("| | seconds | over dense |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds["dense"], strict=True)]
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
