"""Pre-train GPT-2 with ALTO under DeepSpeed's ZeRO.

    deepspeed examples/pretrain_gpt2.py --deepspeed_config configs/gpt2-tiny/zero2.json \
        --model gpt2-tiny --output_dir runs/tiny
"""

from alto_ds.pretrain.__main__ import main

if __name__ == "__main__":
    main()
