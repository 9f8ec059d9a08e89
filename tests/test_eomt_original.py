"""Checkpoints of EoMT's own code, and those whose weights are differences to a pretrained DINOv3."""

import re

import pytest
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, EomtDinov3ForUniversalSegmentation
from typer.testing import CliRunner

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.convert import from_original
from test_eomt import CLASSES, theirs_of

SIZE = 32
# Of timm, small; the second has the position of its class token apart, the third a gated layer.
VITS = {
    "registers": dict(reg_tokens=2, no_embed_class=True),
    "class position": {},
    "gated": dict(reg_tokens=2, no_embed_class=True, mlp_ratio=5.5, act_layer=nn.SiLU),
}


class PapersEoMT(nn.Module):
    """The network of the paper on a ViT of timm, with the names of its code, without masked attention."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.backbone = vit
        self.encoder.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.encoder.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.register_buffer("attn_mask_probs", torch.tensor([1.0, 0.5]))
        self.q = nn.Embedding(9, SIZE)
        self.class_head = nn.Linear(SIZE, 4)
        layers = [nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE)]
        self.mask_head = nn.Sequential(*layers)
        block = nn.Module()
        block.conv1 = nn.ConvTranspose2d(SIZE, SIZE, 2, stride=2)
        block.conv2 = nn.Conv2d(SIZE, SIZE, 3, padding=1, groups=SIZE, bias=False)
        block.norm = nn.LayerNorm(SIZE, eps=1e-6)
        self.upscale = nn.ModuleList([block])

    def forward(self, pixel_values):
        vit = self.encoder.backbone
        tokens = vit._pos_embed(vit.patch_embed(pixel_values))
        for block in vit.blocks[:-2]:
            tokens = block(tokens)
        tokens = torch.cat([self.q.weight[None].expand(len(tokens), -1, -1), tokens], 1)
        for block in vit.blocks[-2:]:
            tokens = block(tokens)
        tokens = vit.norm(tokens)
        queries, patches = tokens[:, :9], tokens[:, -64:].transpose(1, 2).unflatten(2, (8, 8))
        block = self.upscale[0]
        patches = block.conv2(nn.functional.gelu(block.conv1(patches)))
        patches = block.norm(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.class_head(queries), torch.einsum("bnc,bchw->bnhw", self.mask_head(queries), patches)


@torch.no_grad()
def papers(kind: str) -> PapersEoMT:
    timm = pytest.importorskip("timm")
    options = dict(VITS[kind])
    if kind == "gated":
        options["mlp_layer"] = timm.layers.SwiGLUPacked
    torch.manual_seed(0)
    shape = dict(img_size=64, patch_size=8, embed_dim=SIZE, depth=4, num_heads=4, init_values=1.0, num_classes=0)
    network = PapersEoMT(timm.models.VisionTransformer(**shape, global_pool="token", **options)).eval()
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def checkpoint(network: nn.Module) -> dict:
    """As Lightning saves it, of a network that was compiled."""
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    state = {name.replace("blocks.3.", "blocks.3._orig_mod."): value for name, value in state.items()}
    return {"state_dict": state | {"criterion.empty_weight": torch.ones(4)}, "epoch": 3}


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_equals_the_papers_network(kind, tmp_path):
    """Everything but the number of heads is inferred; a step of training reaches all of it."""
    network = papers(kind)
    torch.save(checkpoint(network), tmp_path / "last.ckpt")
    model = from_original(tmp_path / "last.ckpt", num_attention_heads=4, id2label=CLASSES)
    config = model.config
    assert (config.architecture, config.query_blocks, config.upscale_blocks) == ("encoder_only", 2, 1)
    assert (config.num_queries, config.id2label, config.mask_probabilities) == (9, CLASSES, [1.0, 0.5])
    assert not config.masks_in_evaluation  # the flag of the paper's evaluation
    assert (config.loss_points, config.mask_loss, config.mask_weight) == (12544, "cross_entropy", 5.0)
    pixel_values = torch.randn(2, 3, 64, 64)
    classes, masks = network(pixel_values)
    assert classes.std() > 0.1 and masks.std() > 0.1
    found = model(pixel_values)
    torch.testing.assert_close(found.class_queries_logits, classes, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.masks_queries_logits, masks, rtol=0, atol=1e-4)
    with torch.enable_grad():
        labels = dict(mask_labels=[torch.ones(1, 64, 64, dtype=torch.bool)] * 2, class_labels=[torch.tensor([1])] * 2)
        model.train()(pixel_values, **labels).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None and p.numel()]


def test_what_does_not_fit():
    state = checkpoint(papers("registers"))["state_dict"]
    with pytest.raises(ValueError, match=r"1 without a place in the model: unheard_of\.weight"):
        from_original(state | {"network.unheard_of.weight": torch.ones(1)}, num_attention_heads=4)
    name = "network.encoder.backbone.blocks.1.attn.q_norm.weight"
    with pytest.raises(ValueError, match=r"1 without a place in the model: .*layer\.1\.attention\.q_norm\.weight"):
        from_original(state | {name: torch.ones(8)}, num_attention_heads=4)
    with pytest.raises(ValueError, match="no checkpoint of EoMT's code: it has no 'query.weight'"):
        from_original({name: value for name, value in state.items() if name != "network.q.weight"})
    del state["network.encoder.backbone.norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing in the checkpoint: model\.encoder\.vit\.layernorm\.bias"):
        from_original(state, num_attention_heads=4)
    with pytest.raises(ValueError, match="is no EoMT: base="):
        from_original({"backbone.stem.conv1.weight": torch.ones(1)}, base="x")


# ---- differences to the weights of a pretrained ViT ----


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    """Folders of a DINOv3 and of an EoMT that was trained from it, as transformers saves them."""
    theirs = theirs_of("dinov3")
    torch.manual_seed(5)
    fields = {name: getattr(theirs.config, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_register_tokens",
        "intermediate_size", "layer_norm_eps",
    )}  # fmt: skip
    base = DINOv3ViTModel(DINOv3ViTConfig(**fields))
    folders = {name: tmp_path_factory.mktemp(name) for name in ("base", "whole", "differences")}
    state, whole = base.state_dict(), theirs.state_dict()
    names = {name: name_in_base(name, state) for name in whole}
    names = {name: own for name, own in names.items() if own is not None}
    assert len(names) == len(state) - 1  # of masked patches
    with torch.no_grad():
        for name, own in names.items():
            state[own].copy_(whole[name] + 0.01 * torch.randn_like(whole[name]))
    base.save_pretrained(folders["base"])
    theirs.save_pretrained(folders["whole"])
    differences = {name: value - state[names[name]] if name in names else value for name, value in whole.items()}
    theirs.load_state_dict(differences)
    theirs.save_pretrained(folders["differences"])
    return folders


def name_in_base(name: str, state) -> str | None:
    name = name.replace("layers.", "layer.", 1).replace("layernorm.", "norm.")
    return next((own for own in (name, f"model.{name}") if own in state), None)


def papers_state(theirs) -> dict[str, torch.Tensor]:
    """With the names of the paper's code, which takes DINOv3 from transformers."""
    replaced = (
        (r"^embeddings\.", "encoder.backbone.patch_embed."), (r"^layers\.", "encoder.backbone.blocks."),
        (r"^layernorm\.", "encoder.backbone.norm."), (r"^query\.", "q."), (r"^class_predictor\.", "class_head."),
        (r"^mask_head\.fc1\.", "mask_head.0."), (r"^mask_head\.fc2\.", "mask_head.2."),
        (r"^mask_head\.fc3\.", "mask_head.4."), (r"^upscale_block\.block\.", "upscale."),
        (r"\.layernorm2d\.", ".norm."),
    )  # fmt: skip
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, new in replaced:
            name = re.sub(pattern, new, name)
        state[name if name.startswith("criterion.") else f"network.{name}"] = value
    return state


def assert_is_whole(model, folders):
    """Its logits are those of the network that was trained."""
    theirs = EomtDinov3ForUniversalSegmentation.from_pretrained(folders["whole"]).eval()
    theirs.attn_mask_probs.zero_()
    model.config.mask_probabilities = [0.0, 0.0]
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = theirs(pixel_values), model.eval()(pixel_values)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert expected[name].std() > 0.1
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)


def test_differences_need_their_base(dinov3):
    """Added once: not left out, and not added to whole weights."""
    load = MaskClsForUniversalSegmentation.from_pretrained
    with pytest.raises(ValueError, match="holds the differences to the weights of a pretrained ViT.*base="):
        load(dinov3["differences"])
    model = load(dinov3["differences"], base=dinov3["base"])
    assert_is_whole(model, dinov3)
    assert_is_whole(load(dinov3["whole"]), dinov3)
    with pytest.raises(ValueError, match="holds whole weights, to which .* must not be added"):
        load(dinov3["whole"], base=dinov3["base"])


def test_a_new_class_head_over_differences_is_random(dinov3):
    model = MaskClsForUniversalSegmentation.from_pretrained(
        dinov3["differences"], base=dinov3["base"], num_labels=7, ignore_mismatched_sizes=True
    )
    head = model.segmentation_module.class_predictor.weight
    assert head.shape[0] == 8 and 0.05 < head.std() < 0.2


def test_our_own_checkpoint_is_whole(dinov3, tmp_path):
    MaskClsForUniversalSegmentation.from_pretrained(dinov3["whole"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds whole weights, to which nothing is added"):
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path, base=dinov3["base"])


def test_another_vit_is_no_base(dinov3, tmp_path):
    fields = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=8, intermediate_size=48)
    DINOv3ViTModel(DINOv3ViTConfig(**fields)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds another architecture than the backbone"):
        MaskClsForUniversalSegmentation.from_pretrained(dinov3["differences"], base=tmp_path)


def test_published_files(dinov3, tmp_path):
    """A file of EoMT's code with differences, from the command line."""
    theirs = EomtDinov3ForUniversalSegmentation.from_pretrained(dinov3["differences"])
    torch.save(papers_state(theirs), tmp_path / "pytorch_model.bin")
    command = ["convert", str(tmp_path / "pytorch_model.bin"), str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code and "--base" in result.output and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*command, "--base", str(dinov3["base"])])
    assert result.exit_code == 0, result.output
    model, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert_is_whole(model, dinov3)
    processor = MaskClsImageProcessor.from_pretrained(tmp_path / "out")
    assert (model.config.compatibility, processor.compatibility) == ("paper", "paper")
    assert (processor.pad_value, dict(processor.pad_size)) == (0, {"height": 640, "width": 640})
    torch.save(
        papers_state(EomtDinov3ForUniversalSegmentation.from_pretrained(dinov3["whole"])), tmp_path / "whole.bin"
    )
    whole = from_original(tmp_path / "whole.bin", num_attention_heads=4)
    assert whole.config.backbone_config.layer_norm_eps == 1e-5  # as all published ones, whose base says so
    with pytest.raises(ValueError, match="holds whole weights"):
        from_original(tmp_path / "whole.bin", base=dinov3["base"])
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to-transformers", "--base", "x"]
    )
    assert result.exit_code and "--base is for EoMTs" in result.output
