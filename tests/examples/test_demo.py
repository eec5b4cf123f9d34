"""The demo's parts, shortened."""

import pytest
import torch

import whet
from whet import demo


def test_resnet_has_the_published_sizes() -> None:
    # He et al. 2015, table 6: 0.27 M and 0.85 M parameters
    for depth, millions in ((20, 0.27), (56, 0.85)):
        count = sum(p.numel() for p in demo.ResNet(depth).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_shifted_batches_keep_labels_with_images() -> None:
    images = torch.arange(40.0).reshape(40, 1, 1, 1).expand(40, 1, 6, 6).clone() + 1
    batches = demo.Shifted(images, torch.arange(40), most=2, batch=8, flip=True)
    assert len(batches) == 5
    seen = []
    for x, y in batches:
        assert torch.equal(x[:, 0, 3, 3], y + 1.0)  # a shift of 2 cannot move the centre out
        seen += y.tolist()
    assert sorted(seen) == list(range(40))


def test_the_whole_job_in_short(tmp_path) -> None:
    task = demo.task(depth=8, epochs=1)
    recipe = whet.Recipe.parse("steps: [FoldBatchNorm, {StaticInt8: {examples: 128}}]")
    result = whet.apply(recipe, task, rounds=5, step_examples=100, size="0.35x")
    assert result.met
    folder = result.save(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.whet", "model.onnx", "recipe.yaml", "report.json", "report.html"}
    assert result.readings["ratios"]["bytes"] < 0.35
    assert result.readings["gate"]["int8"] == {"expected": 8, "found": 8}
    network = whet.load(folder / "model.whet")
    assert torch.equal(network(*task.example), result.model(*task.example))
