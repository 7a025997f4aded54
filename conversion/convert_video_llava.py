"""
Converts checkpoints of Video-LLaVA, the original's and those of transformers' port (`-hf`); the same as the command
`videollama2 convert`.

    python conversion/convert_video_llava.py LanguageBind/Video-LLaVA-7B --output Video-LLaVA-7B-converted
    python conversion/convert_video_llava.py LanguageBind/Video-LLaVA-7B-hf \
        --video-tower LanguageBind/LanguageBind_Video_merge --output Video-LLaVA-7B-repaired
"""

import sys

from videollama2_hf.cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
