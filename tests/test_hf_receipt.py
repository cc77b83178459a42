"""What the receipt says, and when accelerate() refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import MODELS, VOCAB, build, inputs_for, logits, small_models, tokens  # noqa: F401 (a fixture)
from rich.console import Console
from torch import Tensor, nn
from transformers.models.bart import modeling_bart
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5

import pyfuse
from pyfuse.dispatch import Candidate, Explanation
from pyfuse.hf import AccuracyError
from pyfuse.hf.fingerprint import fingerprint
from pyfuse.hf.linears import activation_name
from pyfuse.hf.patches import FUSED


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfuse.hf.verify.TIMED_SECONDS", 0.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_verify_measures_the_error(name: str, dtype: torch.dtype | None) -> None:
    model = build(name)
    model.train()
    state = torch.get_rng_state()
    receipt = pyfuse.accelerate(model, dtype=dtype, linear=False)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    probes = {"no padding", "right padding", "left padding"}
    assert probes <= set(receipt.errors)
    assert ("left padding, token by token" in receipt.errors) == (
        name in ("llama", "mistral", "gpt2")
    )
    for error, budget in receipt.errors.values():
        assert 0.0 < error <= budget
    assert (receipt.max_error, receipt.budget) in receipt.errors.values()
    assert receipt.speedup is not None and receipt.speedup > 0.0
    receipt.undo()


def test_the_receipt_reads_well() -> None:
    receipt = pyfuse.accelerate(build("llama"), linear=False)
    text = str(receipt)
    for part in (
        "pyfuse.accelerate(LlamaForCausalLM)", "attention", "RMSNorm", "KV cache",
        "15: linear=False",
        "logit error, left padding: ", "speed, forward 1 x 62: ",
    ):  # fmt: skip
        assert part in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(receipt)
    drawn = console.export_text()
    assert "RMSNorm" in drawn and "15: linear=False" in drawn
    assert json.loads(json.dumps(receipt.as_dict()))["patched"]["RMSNorm"] == 5
    assert receipt.patched["RMSNorm"] == 5 and receipt.patched["attention + RoPE"] == 2
    receipt.undo()
    assert "undone: the model is as it was" in str(receipt)


def test_without_verify_nothing_is_run() -> None:
    model = build("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    receipt = pyfuse.accelerate(model, linear=False, verify=False)
    assert receipt.max_error is receipt.budget is receipt.speedup is None and not receipt.errors


@pytest.mark.parametrize("wrong", ["mask ignored", "not causal", "nan"])
def test_a_wrong_result_is_refused_and_undone(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = pyfuse.attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        if wrong == "mask ignored":
            return true(*args, **{**kwargs, "mask": None, "seqlens_k": None})
        if wrong == "not causal":
            return true(*args, **{**kwargs, "causal": False})
        return true(*args, **kwargs) * float("nan")

    model = build("llama")
    inputs = inputs_for(model, "left")
    expected = logits(model, inputs)
    monkeypatch.setattr("pyfuse.hf.attention.attention", attention)
    with pytest.raises(
        AccuracyError, match=r"LlamaForCausalLM: logit error .* the accuracy rule allows"
    ):
        pyfuse.accelerate(model, linear=False)
    assert (
        torch.equal(logits(model, inputs), expected) and model.config._attn_implementation == "sdpa"
    )
    assert not any("_pyfuse" in module.__dict__ for module in model.modules())


def test_the_truth_is_in_float64_and_leaves_the_model_alone() -> None:
    from pyfuse.hf.exact import exact

    model = build("llama")
    inputs = inputs_for(model, "left", 12)
    expected = logits(model, inputs)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with pyfuse.accelerate(model, linear=False, verify=False):
        with exact(model):
            truth = logits(model, inputs)
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert model.config._attn_implementation == "pyfuse"
    assert truth.dtype == torch.float64
    assert 0 < (truth - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_attention_of_its_own_is_reported(name: str) -> None:
    model = {
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4)
        ),
        "gptj": lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(
                vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=8
            )
        ),
    }[name]().eval()
    ids = tokens(2, 11)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        receipt = pyfuse.accelerate(model, linear=False)
        assert torch.equal(
            model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0), expected
        )
    assert "attention" not in receipt.patched
    assert receipt.skipped["attention"] == {
        "it does not go through transformers' AttentionInterface": 2
    }
    assert receipt.patched["LayerNorm"] > 0 and model.config._attn_implementation == "eager"
    assert "it does not go through transformers' AttentionInterface" in str(receipt)


class Plain(hf.PreTrainedModel):
    """A model with nothing in it that pyfuse knows."""

    config_class = hf.PretrainedConfig

    def __init__(self, config: hf.PretrainedConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(10, 4)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_nothing_to_patch_raises() -> None:
    with pytest.raises(ValueError, match="model: nothing in Plain can be accelerated"):
        pyfuse.accelerate(Plain(hf.PretrainedConfig()))


def test_twice_raises_and_names_the_place() -> None:
    model = build("llama")
    receipt = pyfuse.accelerate(model, linear=False, verify=False)
    with pytest.raises(ValueError, match="model: LlamaForCausalLM is accelerated already"):
        pyfuse.accelerate(model)
    receipt.undo()
    inner = pyfuse.accelerate(model.model, linear=False, verify=False)
    with pytest.raises(ValueError, match="model: model is accelerated already"):
        pyfuse.accelerate(model)
    inner.undo()
    with pyfuse.accelerate(model, linear=False, verify=False):
        pass


@pytest.mark.parametrize("model", [nn.Linear(3, 3), "gpt2", None], ids=["module", "name", "none"])
def test_other_things_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"needs a transformers\.PreTrainedModel"):
        pyfuse.accelerate(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype: got torch.int8, needs None or one of"),
        ({"dtype": "float16"}, "dtype: got float16, needs None or one of"),
        ({"linear": "yes"}, "linear: got 'yes', needs 'auto', True or False"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyfuse.accelerate(build("llama"), **options)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        pyfuse.accelerate(build("llama").to("meta"))


def test_linear_true_needs_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfuse.linear.plan", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match="linear: True, but no linear layer of this model is faster"
    ):
        pyfuse.accelerate(build("llama"), linear=True, verify=False)
    receipt = pyfuse.accelerate(build("llama"), verify=False)
    assert receipt.skipped["Linear"] == {
        "no packed form is faster for this shape on this machine": 15
    }
    assert receipt.memory_bytes == 0


def test_undo_after_somebody_elses_patch_raises_and_changes_nothing() -> None:
    model = build("llama")
    receipt = pyfuse.accelerate(model, linear=False, verify=False)
    norm = model.model.norm
    ours = norm.forward
    norm.forward = lambda x: ours(x)
    with pytest.raises(
        RuntimeError, match=r"undo: model\.norm\.forward was replaced after accelerate"
    ):
        receipt.undo()
    assert model.config._attn_implementation == "pyfuse"
    norm.forward = ours
    receipt.undo()
    assert model.config._attn_implementation == "sdpa"


def test_modules_that_somebody_patched_before_are_left_alone() -> None:
    model = build("llama")
    norm = model.model.norm
    norm.forward = type(norm).forward.__get__(norm)
    receipt = pyfuse.accelerate(model, linear=False, verify=False)
    assert receipt.skipped["RMSNorm"] == {"its forward is replaced already": 1}


def test_where_only_plain_torch_could_run_nothing_gets_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an installation without the compiled kernels: only the cache is left to gain from."""
    answer = Explanation("any", (Candidate("cpu", "not built"), Candidate("eager", None)))
    monkeypatch.setattr("pyfuse.hf.entry.explain", lambda *_, **__: answer)
    receipt = pyfuse.accelerate(build("llama"), linear=False, verify=False)
    assert dict(receipt.patched) == {"KV cache": 1}
    assert receipt.skipped["attention"] == {"cpu: not built": 2}
    with pytest.raises(ValueError, match="cpu: not built"):
        pyfuse.accelerate(build("bert"), linear=False, verify=False)


def test_a_model_without_token_ids_is_verified_on_an_image() -> None:
    config = hf.ViTConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    receipt = pyfuse.accelerate(hf.ViTModel(config), linear=False)
    assert receipt.patched["attention"] == 2 and set(receipt.errors) == {"an image"}


def test_a_model_that_cannot_be_probed_says_so() -> None:
    sizes = {
        f"{side}_{n}": v
        for side in ("encoder", "decoder")
        for n, v in (("layers", 1), ("attention_heads", 4))
    }
    config = hf.WhisperConfig(
        vocab_size=VOCAB, d_model=48, **sizes, encoder_ffn_dim=80, decoder_ffn_dim=80,
        max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    with pytest.raises(ValueError, match="no probe batch for the main input 'input_features'"):
        pyfuse.accelerate(model, linear=False)
    assert pyfuse.accelerate(model, linear=False, verify=False).patched["attention"] == 3


FINGERPRINTED = [
    modeling_llama.LlamaMLP, modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention,
    modeling_mistral.MistralMLP, modeling_mistral.MistralDecoderLayer,
    modeling_mistral.MistralAttention,
    modeling_qwen3.Qwen3Attention, modeling_bert.BertSelfOutput, modeling_bert.BertOutput,
    modeling_bert.BertIntermediate, modeling_distilbert.TransformerBlock, modeling_gpt2.GPT2MLP,
    modeling_gpt2.GPT2Block, modeling_t5.T5DenseActDense, modeling_t5.T5DenseGatedActDense,
    modeling_t5.T5LayerFF,
    modeling_bart.BartEncoderLayer, modeling_bart.BartDecoderLayer,
]  # fmt: skip


@pytest.mark.parametrize("cls", FINGERPRINTED, ids=lambda cls: cls.__name__)
def test_the_fused_methods_fit_the_installed_transformers(cls: type[nn.Module]) -> None:
    """A failure after an update: read the new method, adapt the fused one, then its fingerprint."""
    assert fingerprint(cls.forward) in FUSED


def test_a_fingerprint_follows_the_code_and_nothing_else() -> None:
    class A(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Words."""
            y = x + 1  # more words

            return y * 2

    class B(nn.Module):
        def forward(self, x):
            y = x + 1
            return y * 2

    class C(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            return y * 3

    class D(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            return y * 2

    assert fingerprint(A.forward) == fingerprint(B.forward) != fingerprint(C.forward)
    assert fingerprint(D.forward) is None


def test_activations_are_recognised_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    expected = {
        "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "silu": "silu", "swish": "silu",
        "relu": "relu", "quick_gelu": None, "mish": None,
        "relu2": None, "gelu_10": None, "tanh": None, "relu6": None, "prelu": None, "linear": None,
    }  # fmt: skip
    assert {name: activation_name(ACT2FN[name]) for name in expected} == expected


def test_without_transformers_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import pyfuse\n"
        "try:\n    pyfuse.accelerate\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "pip install 'pyfuse[hf]'" in result.stdout


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_other_versions_of_transformers_are_refused(version: str) -> None:
    script = (
        f"import sys, types; t = types.ModuleType('transformers'); t.__version__ = {version!r}\n"
        "sys.modules['transformers'] = t\n"
        "import pyfuse\n"
        "try:\n    pyfuse.accelerate\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert f"transformers: got version {version}, pyfuse needs >= 5.23 and < 6" in result.stdout
