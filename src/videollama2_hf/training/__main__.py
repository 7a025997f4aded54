"""`python -m videollama2_hf.training RECIPE.yaml`: the same as `videollama2 train RECIPE.yaml`."""

import sys

from ..cli import main


main(["train", *sys.argv[1:]])
