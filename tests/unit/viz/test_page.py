"""The page that shows samples: what it holds, and that it asks nobody for anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from synthetic_rows import MODEL, SyntheticCapture
from vllm_tap.cli import main
from vllm_tap.store.dataset import open_dataset
from vllm_tap.store.save import save
from vllm_tap.viz.page import page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset whose prompts and metadata would break a page that took them for HTML."""
    metadata = [{"label": "</script><b>"}, None]
    save(SyntheticCapture(["</script>", "ä"]), tmp_path / "run", model=MODEL, versions={}, metadata=metadata)
    return tmp_path / "run"


def test_a_page_holds_its_samples(folder: Path) -> None:
    """Tokens, positions and norms of every layer, as they are in the dataset; nothing ends the script early."""
    dataset = open_dataset(folder)
    text = page(dataset, [0, 1], lambda token: f"<{token}>")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    shown = json.loads(found[1])
    assert shown["samples"][0]["metadata"] == {"label": "</script><b>"}
    for sample, one in zip(dataset, shown["samples"], strict=True):
        assert one["ids"] == sample.token_ids.tolist()
        assert one["tokens"] == [f"<{token}>" for token in one["ids"]]
        assert one["generated"] == [position >= len(sample.prompt_token_ids) for position in range(len(sample))]
        for layer, norms in zip(one["norms"]["layers"], one["norms"]["values"], strict=True):
            expected = np.linalg.norm(sample.hidden_states.numpy(layer).astype(np.float64), axis=1)
            expected[~np.isfinite(expected)] = np.nan  # as JSON's null
            np.testing.assert_allclose(np.array(norms, float), expected, rtol=1e-3)


def test_a_page_asks_nobody(folder: Path, tmp_path: Path) -> None:
    """It names no other place than the name space of SVG, which is no address."""
    assert main(["view", str(folder), "--to", str(tmp_path / "a.html"), "--samples", "1"]) == 0
    text = (tmp_path / "a.html").read_text()
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)|@import|fetch\(|src=", text)
    assert main(["view", str(folder), "--to", str(tmp_path / "no" / "a.html")]) == 1
