"""`Decoding`: how the continuations of prompts are made, all in one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glm3cli.config.inference import DEFAULTS, SamplingOptions
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.decoding.grammar import Grammar
from glm3cli.infer.decoding.stops import StopTexts
from glm3cli.infer.requests import Request
from glm3cli.infer.sampling import Sampling


@dataclass(frozen=True)
class Decoding:
    """How the continuations of prompts are made.

    Attributes:
        sampling: The rule by which each token is chosen.
        max_new_tokens: The length of the longest continuation, in tokens.
        beams: The rule of a beam search; None for none.
        num_sequences: The number of continuations of each prompt.
        stops: The texts before which a continuation ends.
        stop_ids: The tokens that end a continuation, beside those that always do.
        ignores_ends: Whether no token ends a continuation.
        logprobs: The number of likeliest tokens whose log-probabilities are wanted beside that of
            each new token; None if not even those are.
        lookup: The most tokens that are guessed from the text so far.
        grammar: The grammar that a continuation follows, as `grammar.read_grammar` returns it; None
            for none.
    """

    sampling: Sampling
    max_new_tokens: int = 128
    beams: Beams | None = None
    num_sequences: int = 1
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignores_ends: bool = False
    logprobs: int | None = 0
    lookup: int = 0
    grammar: str | None = None

    def requests(
        self, prompt: Sequence[int], tokenizer: Tokenizer, ends: Sequence[int], seed: int
    ) -> list[Request]:
        """Returns the requests for a prompt: as many as continuations, or one beam search.

        Args:
            prompt: The token ids of the prompt.
            tokenizer: The tokenizer, for the texts that end a continuation.
            ends: The tokens that always end one.
            seed: The seed of the first; those after it have the next ones.
        """
        stop_ids = () if self.ignores_ends else tuple(dict.fromkeys([*ends, *self.stop_ids]))
        grammar = Grammar(self.grammar, tokenizer, stop_ids) if self.grammar else None
        return [
            Request(
                prompt,
                self.sampling,
                self.max_new_tokens,
                stop_ids,
                seed + number,
                StopTexts(tokenizer, self.stops).is_end if self.stops else None,
                self.logprobs,
                self.beams,
                self.lookup,
                grammar,
            )
            for number in range(1 if self.beams else self.num_sequences)
        ]


def to_decoding(
    options: SamplingOptions, logprobs: int | None = None, grammar: str | None = None
) -> Decoding:
    """Returns how continuations are made with these options.

    Args:
        options: The options, which `infer.defaults` has completed.
        logprobs: The number of likeliest tokens whose log-probabilities are wanted; None for none.
        grammar: The grammar that continuations follow; None for none.
    """
    early_stopping = {"no": False, "yes": True, "never": "never"}[options.early_stopping or "no"]
    beams = None
    if (options.num_beams or 1) > 1:
        beams = Beams(
            num_beams=options.num_beams or 1,
            length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
            early_stopping=early_stopping,  # type: ignore[arg-type]
            num_return=options.num_return_sequences,
        )
    return Decoding(
        sampling=to_sampling(options),
        max_new_tokens=options.max_new_tokens,
        beams=beams,
        num_sequences=options.num_return_sequences,
        stops=tuple(options.stop),
        stop_ids=tuple(options.stop_id),
        ignores_ends=options.ignore_eos,
        logprobs=logprobs,
        lookup=options.prompt_lookup,
        grammar=grammar,
    )


def to_sampling(options: SamplingOptions) -> Sampling:
    """Returns the rule by which tokens are chosen with these options.

    Args:
        options: The options; those that are None, as `infer.defaults` leaves none, have our
            defaults.
    """

    def value(name: str) -> Any:
        given = getattr(options, name)
        return DEFAULTS[name] if given is None else given

    return Sampling(
        greedy=not options.draws,
        temperature=value("temperature") or 1.0,  # 0 is greedy
        top_k=value("top_k"),
        top_p=value("top_p"),
        min_p=value("min_p"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        no_repeat_ngram_size=value("no_repeat_ngram_size"),
        logit_bias=options.biases,
    )
