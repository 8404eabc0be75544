"""What is sent of an answer that is retracted in its midst, on SGLang's own request and accumulator."""

from array import array
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import _GenerationStreamAccumulator
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from idlm_sglang.compat.outputs import embeds_by_row, keep_output, send_what_is_new


@pytest.fixture(autouse=True)
def one_stage():
    with get_parallel().override(pp_size=1):
        yield


class Sent:
    """The pieces of one request's answer as they are sent, with the hooks or without."""

    def __init__(self, hooked: bool, stream: bool, embeds: bool):
        params = SamplingParams(max_new_tokens=100)
        embedded = {"input_embeds": [[0.0] * 4] * 3} if embeds else {}
        self.req = Req("r", "", array("q", [5, 6, 7]), params, return_logprob=True, stream=stream, **embedded)
        self.hooked, self.tokens, self.logprobs, self.prompt, self.events = hooked, [], [], None, 0

    def commit(self, *tokens: int) -> None:
        for token in tokens:
            self.req.output_ids.append(token)
            self.req.logprob.output_token_logprobs_val.append(-float(token))
            self.req.logprob.output_token_logprobs_idx.append(token)

    def prefilled(self) -> None:
        self.req.logprob.input_token_logprobs_val, self.req.logprob.input_token_logprobs_idx = [None, -1.0, -2.0], [5, 6, 7]

    def retract(self) -> None:
        keep_output(Req.reset_for_retract, self.req) if self.hooked else self.req.reset_for_retract()

    def send(self) -> None:
        acc = _GenerationStreamAccumulator(
            return_logprob=True,
            return_hidden_states=False,
            return_routed_experts=False,
            return_indexer_topk=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            disaggregation_mode=DisaggregationMode.NULL,
            default_stream_interval=1,
            default_force_stream_interval=4,
            get_cached_tokens_details=lambda req: None,
            is_request_level_customized_info_key=lambda key: False,
            current_weight_version=None,
        )
        accept = _GenerationStreamAccumulator.accept
        (partial(send_what_is_new, accept, acc) if self.hooked else partial(accept, acc))(req=self.req)
        if acc.rids:
            self.events += 1
            self.tokens += acc.output_ids[0]
            self.logprobs += acc.output_token_logprobs_val[0]
            if self.events == 1:
                self.prompt = acc.input_token_logprobs_val[0]


@pytest.mark.parametrize("hooked", [True, False])
def test_a_stream_retracted_before_its_first_token_has_the_prompt_in_its_first_event(hooked):
    sent = Sent(hooked, stream=True, embeds=False)
    sent.retract()
    sent.send()
    sent.prefilled()
    sent.commit(8)
    sent.send()
    assert sent.tokens == [8] and sent.logprobs == [-8.0]
    # What SGLang itself does is the reason for the hook.
    assert (sent.prompt, sent.events) == (([None, -1.0, -2.0], 1) if hooked else ([], 2))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_an_answer_to_embeddings_goes_on_behind_a_retraction(hooked, stream):
    sent = Sent(hooked, stream, embeds=True)
    sent.prefilled()
    for token in range(10, 15):
        sent.commit(token)
        sent.send()
    sent.retract()
    assert sent.req.input_embeds is not None
    kept = list(sent.req.output_ids)
    sent.send()
    # Nothing fixes the draws: where the answer begins again another one follows.
    for token in range(10 + len(kept), 19) if kept else range(30, 39):
        sent.commit(token)
        sent.send()
    sent.req.finished_len = 9
    sent.req.to_finish = None
    sent.req.finished_reason = FINISH_LENGTH(9)
    sent.send()
    whole = sent.tokens == list(range(10, 19)) and sent.logprobs == [-float(token) for token in sent.tokens]
    assert whole == hooked, (sent.tokens, sent.logprobs)


def test_rows_without_embeddings_are_embedded_from_their_tokens():
    """Of a text, of an answer behind the embeddings of its prompt, of a later chunk of both; what SGLang itself replaces comes first."""
    rows = torch.arange(20.0).view(5, 4).tolist()
    text, brings = SimpleNamespace(input_embeds=None), SimpleNamespace(input_embeds=rows)
    batch = SimpleNamespace(reqs=[text, brings, brings, brings], prefix_lens=[0, 0, 3, 6], extend_lens=[2, 3, 4, 2], device="cpu", replace_embeds=None)
    batch.input_embeds = torch.tensor(rows[:3] + rows[3:])
    embeds_by_row(None, batch)
    assert batch.input_embeds is None and batch.replace_positions.tolist() == [2, 3, 4, 5, 6] and batch.replace_embeds.tolist() == rows
    batch.input_embeds, batch.replace_embeds, batch.replace_positions = torch.tensor(rows), torch.full((1, 4), 9.0), torch.tensor([3])
    embeds_by_row(None, batch)
    found = dict(zip(batch.replace_positions.tolist(), batch.replace_embeds.tolist(), strict=True))
    assert found == {2: rows[0], 3: [9.0] * 4, 4: rows[2], 5: rows[3], 6: rows[4]}
