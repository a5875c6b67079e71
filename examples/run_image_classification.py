"""Fine-tune an image classifier with any token reduction method, by the method's recipe.

    python examples/run_image_classification.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --train_dir IMAGES/train --validation_dir IMAGES/val --ignore_mismatched_sizes --output_dir baseline
    python examples/run_image_classification.py --model_name_or_path baseline --reduction bat --share 0.65 \
        --train_dir IMAGES/train --validation_dir IMAGES/val --output_dir baseline-bat

The arguments are those of Hugging Face's scripts, and these:

- `--reduction` is the name of a method, `--share` the share of the multiply-adds to keep, and `--reduction_args` has
  further settings as JSON. Without `--reduction` the model is trained as it is, dense or already reduced.
- `--recipe paper` or `--recipe quick` gives all training arguments that are not on the command line.

LTMP's thresholds and SiT's networks are first calibrated on training images. The script also runs under `accelerate
launch`, and resumes with `--resume_from_checkpoint`. At the end, the output folder has the model, its processor and
`record.json`. An epoch of 1,768 images takes about two minutes with a tiny model on two cores.

To run two processes on CPUs: `accelerate launch --multi_gpu --num_processes 2 examples/run_image_classification.py
--use_cpu True --ddp_backend gloo ...`. Without `--multi_gpu` and without MPI, each process would train alone.
"""

from hf_tokenreduce.training.run import main


if __name__ == "__main__":
    main()
