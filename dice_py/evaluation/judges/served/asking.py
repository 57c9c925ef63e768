"""Asks a server for the answers to many requests: several at a time, kept as they come, and within the budget."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from dice_py.config.judges import OpenAIConfig
from dice_py.errors import DataError, DiceError, JudgeError
from dice_py.evaluation.judges.served.answers import Answer, AnswerCache, first_wins
from dice_py.evaluation.judges.served.client import ChatServer
from dice_py.evaluation.judges.served.usage import Usage
from dice_py.events import Report
from dice_py.storage.cache import cache_folder

Chat = list[dict[str, str]]
"""The messages of a request."""


class Asking:
    """The requests about a number of pairs. `usage` counts them.

    Args:
        config: server, budget, concurrency.
        chats: the messages of each request by its key, which is a digest of all that decides its answer.
        pairs: how many pairs the requests are about.
        report: receives a `progress` event after each answer.
    """

    def __init__(self, config: OpenAIConfig, chats: dict[str, Chat], pairs: int, report: Report) -> None:
        self.usage = Usage(config)
        self._config, self._chats, self._pairs, self._report = config, chats, pairs, report
        self._answers: dict[str, Answer] = {}
        self._unread: list[Answer] = []

    def answers(self) -> dict[str, Answer]:
        """The answer to each request, by key: those that are kept, and those that the server gives now.

        Raises:
            DataError: a request is too long, or so many answers have no verdict that `openai.max_unread` is exceeded
                whatever the others say.
            JudgeError: the server cannot be reached, or the budget is spent. The answers before are kept.
            UsageError: the server refuses the key, the model or the request.
        """
        if not self._chats:
            return {}
        with AnswerCache(cache_folder() / "judge-answers.sqlite") as cache:
            for key, answer in cache.read(self._chats).items():
                self._add(key, answer)
            self.usage.kept = len(self._answers)
            self._check_read()
            if len(self._answers) < len(self._chats):
                self._ask(cache)
        return self._answers

    def _add(self, key: str, answer: Answer) -> None:
        self._answers[key] = answer
        if first_wins(answer, self._config.verdict) is None:
            self._unread.append(answer)

    def _ask(self, cache: AnswerCache) -> None:
        """Asks for what is not kept.

        After a failure no request begins, but the answers of those on their way are kept: they cost as much.
        """
        waiting = [key for key in self._chats if key not in self._answers][::-1]
        running: dict[Future[Answer], str] = {}
        failure: DiceError | None = None
        remedy = "repeat the command when it is up"
        server = ChatServer(self._config)
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge")
        try:
            while running or (waiting and failure is None):
                while waiting and failure is None and self._has_room(len(running)):
                    key = waiting.pop()
                    running[pool.submit(server.ask, self._chats[key])] = key
                if not running:
                    failure = JudgeError(f"the judge's budget is spent: {self.usage.spent()}")
                    remedy = "raise the budget or repeat the command"
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        self._keep(running.pop(future), future, cache)
                    except DiceError as error:
                        failure = failure or error
                self._report(
                    "progress", stage="judge", done=len(self._answers), total=len(self._chats), unit="requests"
                )
        finally:
            # On an interruption, requests on their way end with their connections.
            server.close()
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            done = f"{len(self._answers)} of {len(self._chats)} requests have their answers, which are kept"
            if isinstance(failure, JudgeError):
                done += f": {remedy} to ask for the others"
            raise type(failure)(f"{failure}; {done}")

    def _has_room(self, running: int) -> bool:
        return running < self._config.concurrency and self.usage.allows(running)

    def _keep(self, key: str, future: Future[Answer], cache: AnswerCache) -> None:
        answer = future.result()
        cache.add(key, answer)
        self._add(key, answer)
        self.usage.add(answer)
        self._check_read()

    def _check_read(self) -> None:
        # A pair that is asked twice has two answers, and one that cannot be read leaves it without a verdict.
        missing = -(-len(self._unread) // (2 if self._config.both_orders else 1))
        if missing > self._config.max_unread * self._pairs:
            raise unread_error(self._config, missing, self._pairs, self._unread[0])


def unread_error(config: OpenAIConfig, missing: int, pairs: int, example: Answer) -> DataError:
    """The error where too many pairs are left without a verdict.

    Args:
        missing: of `pairs`.
        example: an answer that cannot be read.
    """
    if config.verdict == "logprobs":
        wanted = "The first token of an answer must be A or B"
        ending = "Change the template or the model"
    else:
        wanted = "An answer must hold [[A]], [[B]] or [[C]]"
        ending = "Change the template, openai.max_tokens or the model"
    cut = " (cut off at openai.max_tokens)" if example.finish == "length" and config.verdict == "text" else ""
    return DataError(
        f"{missing} of {pairs} pairs have no verdict, and openai.max_unread={config.max_unread:g} is the largest share "
        f"that is allowed. {wanted}; one is {example.text[-200:]!r}{cut}. {ending}, or raise openai.max_unread"
    )
