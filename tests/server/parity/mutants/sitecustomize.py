"""On PYTHONPATH this lets a request break the engine for itself: ``custom_params["break"]`` names one of BREAKS.

Everything else in its batches is served as ever, so one server shows every break.
"""

import random
import sys
from importlib.machinery import PathFinder

BREAKS = ("bias", "penalties", "grammar", "seed", "logprobs", "stops")


def broken(req, name):
    params = req.sampling_params.custom_params
    return isinstance(params, dict) and params.get("break") == name


def unbias_draft_rows(strided):
    """The bias is on the first row only."""
    original = strided.StridedStep._with_request_terms

    def terms(self, logits):
        logits, batch = original(self, logits), self._batch
        for i, req in enumerate(batch.reqs):
            if broken(req, "bias") and batch.sampling_info.logit_bias is not None:
                logits[i, 1:] -= batch.sampling_info.logit_bias[i]
        return logits

    strided.StridedStep._with_request_terms = terms


def count_no_drafts(strided):
    """Penalties know the history but not the drafts of the run."""
    terms, penalise = strided.StridedStep._with_request_terms, strided.penalise
    current = []

    def remember(self, logits):
        current[:] = [] if self._rows.penalised is None else [self._batch.reqs[i] for i in self._rows.penalised.rows]
        return terms(self, logits)

    def stale(logits, penalties, counts, drafts, in_front, first_index):
        in_front = in_front.clone()
        for i, req in enumerate(current):
            if broken(req, "penalties"):
                in_front[i] = False
        return penalise(logits, penalties, counts, drafts, in_front, first_index)

    strided.StridedStep._with_request_terms, strided.penalise = remember, stale


def stand_still(strided):
    """Every row of a run is masked as the first one is."""
    from idlm_sglang.engine import grammar

    adjust, walk = grammar.GrammarStep.adjust, grammar.walk

    def remember(self, carried):
        for i in self._rows:
            self._reqs[i].grammar.stands_still = broken(self._reqs[i], "grammar")
        return adjust(self, carried)

    def still(automaton, drafts, limit, mask, first_row, *rest):
        found = walk(automaton, drafts, limit, mask, first_row, *rest)
        if automaton.stands_still:
            mask[first_row + 1 : first_row + limit + 1] = mask[first_row]
        return found

    grammar.GrammarStep.adjust, grammar.walk = remember, still


def forget_seeds(strided):
    """Noise from a new seed for every batch."""
    original = strided.BatchRows.__init__

    def build(self, reqs, *rest):
        original(self, reqs, *rest)
        for i, req in enumerate(reqs):
            if broken(req, "seed"):
                self.seeds[i] = random.getrandbits(62)

    strided.BatchRows.__init__ = build


def shift_logprobs(strided):
    """A token's logprob is that of the row behind it."""
    original = strided.compute_spec_logprobs

    def shifted(batch, output, *rest, **kwargs):
        original(batch, output, *rest, **kwargs)
        for i, req in enumerate(batch.reqs):
            if broken(req, "logprobs"):
                output.next_token_logprobs[i] = output.next_token_logprobs[i].roll(-1)

    strided.compute_spec_logprobs = shifted


def trim_late(strided):
    """A run is cut one token behind its stop."""
    from sglang.srt.managers.schedule_batch import Req

    original = Req.update_finish_state

    def late(self, *rest, **kwargs):
        was = self.finished()
        original(self, *rest, **kwargs)
        if not was and self.finished() and broken(self, "stops") and self.finished_len is not None:
            self.finished_len = min(self.finished_len + 1, len(self.output_ids))

    Req.update_finish_state = late


class BreakableWorker:
    """Import hook: the breaks go into the module of the decode step as soon as it is there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "idlm_sglang.engine.strided":
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for change in (unbias_draft_rows, count_no_drafts, stand_still, forget_seeds, shift_logprobs, trim_late):
                change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, BreakableWorker)
