"""The objects SGLang's scheduler passes to and from the worker."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
from sglang.srt.utils.common import async_d2h


@dataclass
class IsdDraftInput(SpecInput):
    """What a batch carries between iterations: the pending token and the committed length of each request.

    The drafts stay in :class:`~idlm_sglang.engine.state.SlotState`. ``SpecInputType`` is a closed enum; UNO_STATE is
    its member for state that is neither a draft nor a verify input, and no forward runs on it.
    """

    bonus_tokens: torch.Tensor
    new_seq_lens: torch.Tensor
    future_indices: torch.Tensor | None = None

    topk_p: ClassVar[None] = None
    topk_index: ClassVar[None] = None
    hidden_states: ClassVar[None] = None

    def __post_init__(self):
        super().__init__(SpecInputType.UNO_STATE)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None) -> None:
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
            return
        self.bonus_tokens = self.bonus_tokens[new_indices]
        self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, other: "IsdDraftInput") -> None:
        if self.future_indices is not None:
            self.future_indices = torch.cat((self.future_indices, other.future_indices))
            return
        self.bonus_tokens = torch.cat((self.bonus_tokens, other.bonus_tokens))
        self.new_seq_lens = torch.cat((self.new_seq_lens, other.new_seq_lens))


@dataclass
class IsdVerifyInput(DFlashVerifyInput):
    """One step's verify forward: ``draft_token_num`` rows per request, or those of ``ragged_verify_layout``, causal.

    Attributes:
        new_visible: ``(B, W, W)`` bool, or None; False hides a new column from a new row, on top of causality. Read by backends that can.
        custom_mask: the same for SGLang's Triton attention (``engine.masks``), or None.
    """

    new_visible: torch.Tensor | None = None
    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL


@dataclass
class IsdResult(GenerationBatchResult):
    """A decode step's result with what the metrics need.

    Attributes:
        round_stats: ``(B, 4)`` float32 per request: valid drafts, accepted drafts, sum of min(1, p/q), drafts that are no survivors.
            It reaches the host with the tokens, in the same asynchronous copy.
        limits: host list, the draft limit of each request in this step (0: one token per step).
        lens: host list, rows that each request had in the forward; None: the step's width. doubted: host list, requests of which a draft was left
            out because it would hardly have stood; None: of none.
    """

    round_stats: torch.Tensor | None = None
    limits: list[int] | None = None
    lens: list[int] | None = None
    doubted: list[bool] | None = None

    def copy_to_cpu(self, *args, **kwargs):
        if self.next_token_ids.device.type == "cpu":
            return self._is_on_cpu()
        if self.round_stats is not None:
            self.round_stats = async_d2h(self.round_stats)
        return super().copy_to_cpu(*args, **kwargs)

    def _is_on_cpu(self) -> None:
        self.copy_auxiliary_output_to_cpu()
        self.copy_done.record()


def decode_result(out, logits_output, new_seq_lens, tokens, accept_lens, last, stride: int, **more) -> IsdResult:
    """The result of a decode step of B requests.

    Args:
        out: what SGLang's worker returned for the forward.
        logits_output: with the logprobs that were asked for.
        new_seq_lens: ``(B,)`` int64, the lengths behind the step.
        tokens: ``(B * stride,)`` int64.
        accept_lens: ``(B,)`` int32, how many of them are committed.
        last: ``(B,)`` int64, the last of these.
        more: other fields of :class:`IsdResult`.
    """
    return IsdResult(
        logits_output=logits_output,
        next_token_ids=tokens,
        accept_lens=accept_lens,
        new_seq_lens=new_seq_lens,
        next_draft_input=IsdDraftInput(last, new_seq_lens),
        speculative_num_draft_tokens=2 * stride - 1,
        speculative_output_stride=stride,
        can_run_cuda_graph=out.can_run_cuda_graph,
        expert_distribution_metrics=out.expert_distribution_metrics,
        **more,
    )
