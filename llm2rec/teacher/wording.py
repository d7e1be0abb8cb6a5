"""Wordings of prompts: texts around the history and the candidates, by the kind of item.

Every wording ends where a title follows. In a wording, ``{history}`` and ``{candidates}`` stand for lists of titles,
each title with its separator, and have a space or nothing on either side.
"""

from dataclasses import dataclass

__all__ = ["Wordings", "plain_wordings", "wordings_for"]


@dataclass(frozen=True)
class Wordings:
    """Texts around the lists of a prompt, in reading order, one tuple per wording.

    Attributes:
        histories: Text before and after the history.
        questions: Text before the history, between it and the candidates, and after them.
    """

    histories: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, ...], ...]


_MOVIES = (
    (
        "Movies somebody watched, from the earliest to the latest: {history} The movie they watched after that:",
        "A viewer's evenings so far, film by film: {history} Tonight's film:",
        "Watch log, oldest entry on top: {history} Newest entry, a movie called",
        "First to last, one person has seen the films {history} and will go on with",
        "Having liked these movies in turn: {history} the same person should try",
    ),
    (
        "Movies somebody watched, from the earliest to the latest: {history} One of these movies came next: "
        "{candidates} It was:",
        "A viewer's evenings so far, film by film: {history} On offer tonight: {candidates} Tonight's film:",
        "Watch log, oldest entry on top: {history} Possible next entries: {candidates} The true one, a movie called",
        "First to last, one person has seen the films {history} and out of {candidates} will go on with",
        "Having liked these movies in turn: {history} and free to take any of {candidates} the same person should try",
    ),
)
_GAMES = (
    (
        "Games somebody bought, from the first to the most recent: {history} The game they bought after that:",
        "A player's shelf, filled from left to right: {history} Next on the shelf goes",
        "Play log, oldest entry on top: {history} Newest entry, a game called",
        "One after another this person played {history} and then started",
        "Having had fun with these games in turn: {history} the same player should try",
    ),
    (
        "Games somebody bought, from the first to the most recent: {history} One of these games came next: "
        "{candidates} It was:",
        "A player's shelf, filled from left to right: {history} Still in the shop: {candidates} Next on the shelf goes",
        "Play log, oldest entry on top: {history} Possible next entries: {candidates} The true one, a game called",
        "One after another this person played {history} and then, given the choice of {candidates} started",
        "Having had fun with these games in turn: {history} and free to take any of {candidates} the same player "
        "should try",
    ),
)
_MUSIC = (  # without a noun for the item: titles may be artists, albums or songs
    (
        "What somebody listened to, from the earliest to the latest: {history} What they listened to after that:",
        "A listener's queue, played from the top: {history} Up next:",
        "Music log, oldest entry on top: {history} Newest entry:",
        "One after another this person put on {history} and then",
        "Having enjoyed, in turn, {history} the same listener should hear",
    ),
    (
        "What somebody listened to, from the earliest to the latest: {history} One of these came next: {candidates} "
        "It was:",
        "A listener's queue, played from the top: {history} Waiting to be played: {candidates} Up next:",
        "Music log, oldest entry on top: {history} Possible next entries: {candidates} The true one:",
        "One after another this person put on {history} and then, given the choice of {candidates} went for",
        "Having enjoyed, in turn, {history} and free to take any of {candidates} the same listener should hear",
    ),
)
_BOOKS = (
    (
        "Books somebody read, from the earliest to the latest: {history} The book they read after that:",
        "A reader's bedside pile, in the order it was finished: {history} Opened next:",
        "Reading log, oldest entry on top: {history} Newest entry, a book called",
        "One after another this person read {history} and then began",
        "Having liked these books in turn: {history} the same reader should try",
    ),
    (
        "Books somebody read, from the earliest to the latest: {history} One of these books came next: {candidates} "
        "It was:",
        "A reader's bedside pile, in the order it was finished: {history} Still unread: {candidates} Opened next:",
        "Reading log, oldest entry on top: {history} Possible next entries: {candidates} The true one, a book called",
        "One after another this person read {history} and then, given the choice of {candidates} began",
        "Having liked these books in turn: {history} and free to take any of {candidates} the same reader should try",
    ),
)
_NEUTRAL = (  # neither plural nor article, which unknown words may form irregularly
    (
        "Every {domain} somebody chose, from the earliest to the latest: {history} The {domain} chosen after that:",
        "One {domain} after another, this person took {history} and then",
        "Log of one user, each line naming one {domain} and the oldest on top: {history} Newest line:",
        "Having liked, in turn, {history} the same person may like as the next {domain}",
        "A person's choices so far, {domain} by {domain}: {history} The choice to come:",
    ),
    (
        "Every {domain} somebody chose, from the earliest to the latest: {history} The {domain} that came next is "
        "among these: {candidates} It was:",
        "One {domain} after another, this person took {history} and then, given the choice of {candidates} took",
        "Log of one user, each line naming one {domain} and the oldest on top: {history} Possible next lines: "
        "{candidates} The true one:",
        "Having liked, in turn, {history} and free to take any of {candidates} the same person may like as the next "
        "{domain}",
        "A person's choices so far, {domain} by {domain}: {history} On offer: {candidates} The choice to come:",
    ),
)
_BY_WORD = {
    **dict.fromkeys(("movie", "film"), _MOVIES),
    **dict.fromkeys(("game", "video game", "videogame"), _GAMES),
    **dict.fromkeys(("artist", "music", "song", "track", "album"), _MUSIC),
    **dict.fromkeys(("book", "novel"), _BOOKS),
}
_PLAIN_CANDIDATES = "The next {domain} is one of these:"
_PLAIN_ENDING = "The {domain} chosen next:"


def wordings_for(domain: str) -> Wordings:
    """The wordings for a kind of item.

    Args:
        domain: The dataset's word for one item, such as `film`; letter case, white space and a plural `s` are ignored.
            Unknown words are inserted into neutral wordings.
    """
    word = " ".join(domain.split())
    known = word.casefold()
    histories, questions = _BY_WORD.get(known) or _BY_WORD.get(known.removesuffix("s")) or _NEUTRAL
    return Wordings(tuple(_parts(text, word) for text in histories), tuple(_parts(text, word) for text in questions))


def plain_wordings(prefix: str, suffix: str, domain: str, *, title_next: bool) -> Wordings:
    """The single wording from the settings' prefix and suffix.

    Args:
        prefix: Text before the history; ``{domain}`` stands for ``domain``.
        suffix: Text at the end.
        domain: The dataset's word for one item.
        title_next: Whether a title follows, which replaces a blank suffix.
    """
    ending = suffix if suffix.strip() or not title_next else _PLAIN_ENDING
    history, question = (prefix, ending), (prefix, _PLAIN_CANDIDATES, ending)
    return Wordings(
        (tuple(text.replace("{domain}", domain) for text in history),),
        (tuple(text.replace("{domain}", domain) for text in question),),
    )


def _parts(text: str, domain: str) -> tuple[str, ...]:
    """Texts around the lists, split before ``{domain}`` is replaced, since the word may contain braces."""
    parts = text.replace("{candidates}", "{history}").split("{history}")
    return tuple(part.strip().replace("{domain}", domain) for part in parts)
