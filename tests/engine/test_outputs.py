"""What is sent of an answer that is retracted in its midst, on SGLang's own request and accumulator."""

from array import array
from functools import partial

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import _GenerationStreamAccumulator
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from idlm_sglang.compat.outputs import begin_again, send_what_is_new


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
        self.req.reset_for_retract()
        if self.hooked:
            begin_again(None, self.req)

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
def test_an_answer_to_embeddings_that_begins_again_is_sent_once(hooked, stream):
    sent = Sent(hooked, stream, embeds=True)
    sent.prefilled()
    answer = list(range(10, 19))
    for token in answer[:5]:
        sent.commit(token)
        sent.send()
    sent.retract()
    sent.send()
    for token in answer:
        sent.commit(token)
        sent.send()
    sent.req.finished_len = len(answer)
    sent.req.to_finish = None
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH

    sent.req.finished_reason = FINISH_LENGTH(len(answer))
    sent.send()
    once = sent.tokens == answer and sent.logprobs == [-float(token) for token in answer]
    assert once == hooked, (sent.tokens, sent.logprobs)
