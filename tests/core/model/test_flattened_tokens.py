"""Models that flatten the tokens of a batch before a linear, and layers that see only some tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from meteora_core import attach, detach
from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.peft_folder import Adapter, AdapterInfo, LoraWeights
from meteora_core.errors import UsageError
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.model.tokens import check_observable
from meteora_core.routing import IGNORE, record_routes
from meteora_core.training.checkpointing import enable_checkpointing
from meteora_core.training.encoding import TrainRow, collate
from meteora_core.training.joint_adapters import TogetherObjective
from meteora_core.training.loop import Counts
from meteora_core.training.ridge import RidgeOptions, ridge_gates
from support.tiny_models import make_tiny_llama

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [1] * 7])


def make_bank(model: nn.Module, names: tuple[str, ...]) -> AdapterBank:
    """Three random adapters on the linears of a model whose names end in ``names``."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and path.endswith(names)}
    adapters = []
    for seed in range(3):
        torch.manual_seed(seed)
        weights = {path: LoraWeights(torch.randn(2, m.in_features) * 0.3, torch.randn(m.out_features, 2) * 0.3, 1.0) for path, m in linears.items()}
        adapters.append(Adapter(AdapterInfo(f"a{seed}", "", "", None, 2, 2.0, False, 0.0), weights))
    return AdapterBank.stack(adapters)


def make_opt() -> nn.Module:
    """OPT: fc1 and fc2 see (batch * tokens, h)."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=64, dropout=0.0, **sizes)).eval()


def make_qwen_moe() -> nn.Module:
    """Qwen2-MoE: the shared expert sees (batch * tokens, h)."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, **sizes)).eval()


@pytest.fixture(params=["opt", "qwen2_moe"])
def model(request) -> nn.Module:
    base, names = (make_opt(), ("q_proj", "fc1", "fc2")) if request.param == "opt" else (make_qwen_moe(), ("q_proj", "shared_expert.down_proj"))
    return attach(base, make_bank(base, names), seed=3)


def test_routes_forced_by_row_and_by_token_are_those_of_each_alone(model) -> None:
    rows = torch.tensor([2, 0, 1])
    with torch.no_grad():
        with model.meteora.force(rows):
            together = model(IDS, attention_mask=MASK).logits
        with model.meteora.force(rows[:, None].expand(3, 7).contiguous()):
            torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, together)
        for row, adapter in enumerate(rows.tolist()):
            with model.meteora.force(adapter):
                alone = model(IDS[row : row + 1], attention_mask=MASK[row : row + 1]).logits
            real = MASK[row].bool()
            torch.testing.assert_close(together[row, real], alone[0, real], rtol=1e-4, atol=1e-5)


def test_recorded_rows_are_those_of_each_alone(model) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with torch.no_grad():
        with record_routes(model) as together:
            model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
        assert together.shares().shape == (3, 9, 3)
        with record_routes(model) as alone:
            model.generate(input_ids=IDS[1:2], attention_mask=torch.ones_like(IDS[1:2]), **options)
    torch.testing.assert_close(together.shares()[1:2], alone.shares(), rtol=1e-4, atol=1e-5)
    assert torch.equal(together.packed(1)[0], alone.packed(0)[0])


def test_labels_of_flattened_layers_belong_to_their_tokens(model) -> None:
    labels = torch.full((3, 7), IGNORE)
    labels[1, 4] = 2
    with torch.no_grad():
        with record_routes(model) as routes:
            model(IDS)
        with model.meteora.label_gates(labels, keep_hits=True) as seen:
            model.base_model(input_ids=IDS)
    for path, _ in meteora_layers(model):
        assert bool(seen.hits[path].view(3, 7)[1, 4]) == bool(routes.layer(path).indices[1, 4, 0] == 2)


def test_copies_and_pickles_observe_their_own_calls(model) -> None:
    expected = None
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), twin.meteora.force(torch.tensor([2, 0, 1])):
            found = twin(IDS).logits
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    hooks = [module for module in detach(model).modules() if module._forward_pre_hooks]
    assert not hooks


def test_routes_of_another_batch_are_refused_in_one_line() -> None:
    model = make_tiny_llama()
    attach(model, make_bank(model, ("q_proj",)))
    with torch.no_grad():
        for forced in (torch.tensor([0, 1]), torch.zeros(3, 6, dtype=torch.int64)):
            with model.meteora.force(forced), pytest.raises(UsageError, match="forced for a batch of shape"):
                model(IDS)
        with model.meteora.label_gates(torch.zeros(2, 7, dtype=torch.int64)), pytest.raises(UsageError, match="labelled for a batch"):
            model(IDS)


class Experts(nn.Module):
    """An old-style mixture of experts: a list of linears, each of which processes some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        flat = inputs_embeds.reshape(-1, 4)
        chosen = flat[:, 0] > 0
        out = torch.empty_like(flat)
        for expert, where in zip(self.experts, (chosen, ~chosen), strict=True):
            out[where] = expert(flat[where])
        return out.view_as(inputs_embeds)


def test_routed_experts_run_and_are_refused_where_tokens_must_be_known() -> None:
    model = Experts()
    attach(model, make_bank(model, ("experts.0", "experts.1")))
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        assert model(inputs_embeds=x).shape == x.shape
        with model.meteora.force("a1"):
            model(inputs_embeds=x)
        contexts = (
            lambda: record_routes(model),
            lambda: model.meteora.force(torch.tensor([0, 1])),
            lambda: model.meteora.label_gates(torch.zeros(2, 3, dtype=torch.int64)),
        )
        for context in contexts:
            with context(), pytest.raises(UsageError, match=r"experts\.0"):
                model(inputs_embeds=x)
    with pytest.raises(UsageError, match=r"gate labels cannot tell which tokens experts\.0"):
        check_observable(dict(meteora_layers(model)), "gate labels")


def test_adapters_of_flattening_models_train_together_as_they_do_alone(model) -> None:
    rows = [TrainRow(tuple(IDS[place].tolist()), (task,) * 7, 3) for place, task in enumerate((2, 0, 1))]
    set_trainable(model, "gates+adapters")
    enable_checkpointing(model.train())
    objective = TogetherObjective(torch.float32, ("a0", "a1", "a2"))
    counts = Counts(18, 21, (6, 6, 6))

    def gradients(parts) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            batch = collate(part, 1, 1)
            with objective.around(model, batch):
                objective.compute(model, batch, counts)[0].backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None and "lora" in name}

    together, alone = gradients([rows]), gradients([[row] for row in rows])
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-6)


def test_ridge_gates_of_flattening_models_are_set_from_each_tokens_label(model) -> None:
    rows = [TrainRow(tuple(IDS[place].tolist()), (task,) * 7, 3) for place, task in enumerate((2, 0, 1))]
    options = RidgeOptions(base_share=0.0, half=False)
    ridge_gates(model, [rows], 1, options)
    together = {path: layer.gate.clone() for path, layer in meteora_layers(model)}
    ridge_gates(model, [[row] for row in rows], 1, options)
    for path, layer in meteora_layers(model):
        torch.testing.assert_close(layer.gate, together[path], rtol=1e-3, atol=1e-4)
