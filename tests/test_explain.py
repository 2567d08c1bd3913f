"""Grad-CAM: where it points, how the centre's share is counted, what the sentence says."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from pcam_automl.bundle import ModelBundle
from pcam_automl.errors import InputError
from pcam_automl.explain import attention, centre_share, explain_image, explain_patches, overlay, sentence
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.predict import build_predictor, image_probs
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute


class CornerNetwork(nn.Module):
    """Adds up the brightness of the upper left quarter alone, times ``sign``."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.blur, self.sign = nn.AvgPool2d(4), sign
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        cells = self.blur(x * self.weight)
        side = cells.shape[-1] // 2
        return self.sign * cells[:, :, :side, :side].mean(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_network_that_reads_one_corner_is_shown_to_look_there_whatever_its_call(sign: float) -> None:
    image = torch.zeros(2, 3, 32, 32)
    image[:, :, 4:8, 4:8] = 1.0  # a bright spot in the corner that it reads
    maps = attention(CornerNetwork(sign), image)
    assert maps.shape == (2, 32, 32)
    assert float(maps.max()) == 1.0
    assert float(maps.min()) == 0.0
    assert float(maps[0, :12, :12].sum()) == pytest.approx(float(maps[0].sum()))


def test_trained_corner_is_found_by_a_convolutional_network() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=1)
    images = torch.randn(64, 3, 64, 64) * 0.1
    label = (torch.arange(64) % 2).float()
    images[label == 1, :, :16, :16] += 2.0
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(25):
        loss = nn.functional.binary_cross_entropy_with_logits(network(images)[:, 0], label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    maps = attention(network, images[label == 1][:8], toward=torch.ones(8))
    quarters = maps.reshape(8, 2, 32, 2, 32).sum(dim=(2, 4)).mean(dim=0)
    assert quarters.argmax() == 0, quarters


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_maps_fill_the_input_and_leave_the_network_as_it_was(name: str) -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    network = timm.create_model(name, num_classes=1, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    before, modules = network(images), [n for n, _ in network.named_modules()]
    maps = attention(network, images)
    assert maps.shape == (2, 64, 64)
    assert float(maps.min()) >= 0.0
    assert float(maps.max()) <= 1.0
    assert torch.equal(network(images), before)
    assert [n for n, _ in network.named_modules()] == modules


def test_explaining_the_other_class_turns_the_map_around() -> None:
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=1).eval()
    images = torch.randn(1, 3, 64, 64)
    for_, against = (attention(network, images, toward=torch.tensor([sign])) for sign in (1.0, -1.0))
    assert float((for_ * against).sum()) < 0.5 * float((for_**2).sum())


def test_network_without_a_map_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1))
    with pytest.raises(InputError, match="needs a layer with a map"):
        attention(network, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("crop", "px"), [(32, 32), (64, 64), (96, 96), (96, 224), (50, 70), (64, 33)])
def test_uniform_attention_has_the_centres_share_of_the_area(crop: int, px: int) -> None:
    assert centre_share(np.ones((px, px), np.float32), crop) == pytest.approx((32 / crop) ** 2)


def test_attention_wholly_in_or_out_of_the_centre_counts_one_or_nothing() -> None:
    inside, outside = np.zeros((128, 128), np.float32), np.ones((128, 128), np.float32)
    inside[32:96, 32:96] = 0.7  # crop 64 resized to 128: the centre 32 px are the middle half
    outside[32:96, 32:96] = 0.0
    shares = centre_share(np.stack([inside, outside, np.zeros_like(inside)]), 64)
    assert shares[:2].tolist() == [1.0, 0.0]
    assert np.isnan(shares[2])


def test_overlay_colours_the_attended_place_and_pales_what_is_not_seen() -> None:
    patch = np.full((96, 96, 3), 100, np.uint8)
    seen = np.zeros((64, 64), np.float32)
    seen[:8, :8] = 1.0
    shown = overlay(patch, seen, 64)
    assert shown.shape == (96, 96, 3)
    assert (shown[40, 75] == 100).all()  # seen, not attended
    assert (shown[5, 5] > 100).all()  # outside of the crop
    assert shown[18, 18, 0] > shown[18, 18, 2] + 50  # yellow


def predictor_of(recipe: Recipe, bias: float) -> object:
    network = build_network(recipe, Weights("none"), seed=0)
    with torch.no_grad():
        network.get_classifier().bias.fill_(bias)  # type: ignore[operator,union-attr]
    bundle = ModelBundle(recipe, Normalisation((0.5,) * 3, (0.5,) * 3), network.state_dict(), {}, {})
    return build_predictor(bundle, Compute("cpu"))


@pytest.mark.parametrize(("bias", "word"), [(8.0, "attention"), (-8.0, "what speaks against tumour")])
def test_explained_image_names_probability_and_share(bias: float, word: str) -> None:
    predictor = predictor_of(Recipe(backbone="test_resnet", crop_size=64), bias)
    patch = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    picture, text = explain_image(predictor, patch)  # type: ignore[arg-type]
    found = explain_patches(predictor, patch[None])[0]  # type: ignore[arg-type]
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 2 * 96
    assert f"Probability {found.prob:.2f} of tumour" in text
    assert word in text
    assert found.prob == pytest.approx(float(image_probs(predictor, patch[None])[0]))  # type: ignore[attr-defined]


def test_sentence_gives_probability_and_share_in_plain_words() -> None:
    assert sentence(0.93, 0.71) == (
        "Probability 0.93 of tumour: 71 % of the network's attention lies inside the centre 32x32, "
        "which alone decides the label in PatchCamelyon."
    )
    assert "no region" in sentence(0.2, float("nan"))


def test_given_probabilities_decide_what_is_explained() -> None:
    predictor = predictor_of(Recipe(backbone="test_resnet", crop_size=64), 0.0)
    patches = np.random.default_rng(0).integers(0, 255, (1, 96, 96, 3)).astype(np.uint8)
    probs = [0.9, 0.1]
    found = [explain_patches(predictor, patches, probs=np.array([p]))[0] for p in probs]  # type: ignore[arg-type]
    assert [e.prob for e in found] == probs
    assert ["against tumour" in e.sentence for e in found] == [False, True]
    (below,) = explain_patches(predictor, patches, probs=np.array([0.1]), threshold=0.05)  # type: ignore[arg-type]
    assert "against tumour" not in below.sentence
    assert np.array_equal(below.overlay, found[0].overlay), "the map is of its call"
    assert not np.array_equal(found[0].overlay, found[1].overlay)
