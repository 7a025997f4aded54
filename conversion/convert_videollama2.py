"""
Converts original checkpoints of VideoLLaMA 2; the same as the command `videollama2 convert`.

    python conversion/convert_videollama2.py --help
"""

import sys

from videollama2_hf.cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
