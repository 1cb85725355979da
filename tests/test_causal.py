"""Causal attention by runs of queries."""

import pytest
import torch
import torch.nn.functional as F

from qbench.calib import causal
from qbench.calib.causal import forward_only
from qbench.calib.stages import Stages


@pytest.mark.parametrize("length", [1, 128, 129, 300])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_by_runs_is_attention(length, kv_heads):
    query = torch.randn(2, 4, length, 16, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, length, 16, dtype=torch.float64) for _ in range(2))
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with forward_only():
        found = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


def test_only_causal_attention_without_a_mask_is_divided(monkeypatch):
    divided = []
    monkeypatch.setattr(causal, "_by_runs", lambda q, k, v, **_: divided.append(q.shape) or q)
    q, mask = torch.randn(1, 1, 200, 8), torch.ones(200, 200, dtype=torch.bool)
    with forward_only():
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)
        F.scaled_dot_product_attention(q[:, :, :1], q, q, is_causal=True)
        assert not divided
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert len(divided) == 1


def test_a_pass_that_pauses_leaves_the_mode_to_itself(monkeypatch):
    """Between two stages whoever runs has gradients and torch's own attention, as before."""
    divided = []
    monkeypatch.setattr(causal, "_by_runs", lambda q, k, v, **_: divided.append(q.shape) or q)
    first, second = torch.nn.Identity(), torch.nn.Identity()

    def forward(x):
        return second(F.scaled_dot_product_attention(*[first(x)] * 3, is_causal=True))

    x = torch.randn(1, 1, 200, 8, requires_grad=True)
    stages = Stages(forward, [x], [first, second])
    for _ in range(2):
        for _ in stages.until_next():
            assert torch.is_grad_enabled()
        before = len(divided)
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
        assert len(divided) == before
    stages.close()
    assert len(divided) == 1
