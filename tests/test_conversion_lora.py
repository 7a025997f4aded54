"""LoRA as PEFT merges it, and what PEFT does that a plain merge does not."""

import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conversion_utils import edit_json
from golden_utils import GOLDENS
from videollama2_hf.conversion import ConversionError
from videollama2_hf.conversion.lora import read_adapter


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.embed = nn.Linear(6, 5), nn.Linear(6, 4), nn.Embedding(7, 6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_are_those_of_peft(tmp_path, use_rslora):
    """With other ranks and scales for some modules, where the first pattern that fits counts, and an embedding."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=use_rslora,
        target_modules=["q_proj", "k_proj", "embed"],
        rank_pattern={"k_proj": 3},
        alpha_pattern={".*_proj": 7, "q_proj": 5},
        init_lora_weights=False,
    )
    plain = Pair()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = get_peft_model(plain, config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    changes = read_adapter(tmp_path).changes
    after = model.merge_and_unload().state_dict()
    assert set(changes) == {name for name in before if name.endswith(".weight")}
    for name, change in changes.items():
        assert not torch.equal(after[name], before[name])
        torch.testing.assert_close(change.merge(before[name], torch.float32), after[name])


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "OLoRA"}])
def test_adapter_whose_base_was_changed_is_refused(tmp_path, changes):
    folder = shutil.copytree(GOLDENS / "lora" / "checkpoint-lora", tmp_path / "lora")
    edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(ConversionError, match=re.escape(str(changes))):
        read_adapter(folder)
