"""docs/backbones.md: its Python runs as printed, on small models that stand for the reader's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from test_backbones import unet

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)

NETWORKS = """
import torch
from torch import nn

class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, label, labels=None):
        return self.last(torch.tanh(self.first(x) + label.reshape(-1, 1, 1, 1)))

class Edm(Flow):
    pass

class UNetModel(Flow):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(4, 4))
"""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[0])
def test_block_runs_as_printed(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """A reader who pastes the block into a fresh session, with models of his own, gets an error."""
    if "deepinv" in block:
        request.getfixturevalue("deepinv")
    if "azula" in block:
        pytest.importorskip("azula.denoise", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    Path("my_networks.py").write_text(NETWORKS)
    if "my-ddpm" in block:
        from PIL import Image

        DDPMPipeline(unet(), DDPMScheduler()).save_pretrained("my-ddpm")
        Image.new("RGB", (16, 16), (200, 90, 30)).save("photo.png")
    if "weights.pt" in block:
        scope: dict[str, Any] = {}
        exec(NETWORKS, scope)
        torch.save(scope["Edm"]().state_dict(), "weights.pt")
    exec(compile(block, str(PAGE), "exec"), {"__name__": "block"})
    sys.modules.pop("my_networks", None)


def test_the_table_names_every_kind() -> None:
    """A kind that can be loaded and is not on the page, or the other way round."""
    from posteriori.backbones.pretrained import _KINDS

    named = set(re.findall(r"^\| .*? \| `([\w-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named - {"kind"} == set(_KINDS)  # the table's head


def test_the_page_has_blocks() -> None:
    """Nothing above would run, and pass, were the page written in another form."""
    assert len(BLOCKS) == 6
