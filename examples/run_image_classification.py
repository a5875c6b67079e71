"""Fine-tune an image classifier with any token reduction, by the method's recipe. The arguments are Hugging Face's.

    python examples/run_image_classification.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --train_dir IMAGES/train --validation_dir IMAGES/val --ignore_mismatched_sizes --output_dir baseline
    python examples/run_image_classification.py --model_name_or_path baseline --reduction bat --share 0.65 \
        --train_dir IMAGES/train --validation_dir IMAGES/val --output_dir baseline-bat

`--reduction` names a method, `--share` the share of the multiply-adds to keep, `--reduction_args` further settings
as JSON. Without a reduction it trains the model as it is: dense, or reduced already. `--recipe paper` or `quick` gives
the training arguments that are not on the command line. LTMP's thresholds and SiT's slimming are calibrated on
training images first. Runs alone or by `accelerate launch`, resumes with `--resume_from_checkpoint`, and ends with
the model, its processor and `record.json` in the output folder. An epoch of 1,768 images takes about two minutes with
a tiny model on two cores.

Two processes on CPUs: `accelerate launch --multi_gpu --num_processes 2 examples/run_image_classification.py --use_cpu
True --ddp_backend gloo ...`. Without that first flag, and without MPI, each process would train alone.
"""

from hf_tokenreduce.training.run import main


if __name__ == "__main__":
    main()
