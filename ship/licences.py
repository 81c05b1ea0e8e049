"""What upstream licences ask of whoever passes a model on; facts and links, not legal advice.

Sources: the usage notes of DeepSeek-R1's card (which distillate comes from which base), and the Llama 3.1 and 3.3 Community License
Agreements, section 1.b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from r1q.ship.facts import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """A licence as a model card names it, and what it asks; `notice` is the text of a NOTICE file that it wants beside the model."""

    id: str
    name: str = ""
    link: str = ""
    duties: tuple[str, ...] = ()
    notice: str = ""


def _llama(version: str) -> Licence:
    name = f"Llama {version} Community License"
    return Licence(
        id=f"llama{version}",
        name=name,
        link=f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        duties=(
            f"This model derives from Llama {version}: Meta's {name} comes with it. Pass on a copy of the agreement with the model.",
            "Show “Built with Llama” prominently on the website, interface, blog post, about page or documentation of what uses it.",
            "A model made or improved with it that you distribute must have “Llama” at the beginning of its name.",
            "Keep the NOTICE file of this parcel with every copy.",
            "Its use must follow Meta's Acceptable Use Policy, and who had more than 700 million monthly users at its release "
            "needs a licence of their own from Meta.",
        ),
        notice=(
            f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved.\n"
        ),
    )


_KNOWN: Mapping[str, Licence] = MappingProxyType(
    {
        "mit": Licence(
            id="mit", name="MIT", duties=("Keep the copyright notice and the licence text with every copy.",)
        ),
        "apache-2.0": Licence(
            id="apache-2.0",
            name="Apache-2.0",
            duties=("Pass on a copy of the licence, and say which files you changed; these weights were quantized.",),
        ),
        **{licence.id: licence for licence in (_llama("3.1"), _llama("3.2"), _llama("3.3"))},
    }
)
# DeepSeek-R1's card: its weights are MIT; what was distilled into keeps its own licence beside it.
_DISTILLS: tuple[tuple[str, str, str], ...] = (
    ("distill-llama-8b", "mit", "llama3.1"),
    ("distill-llama-70b", "mit", "llama3.3"),
    ("distill-qwen", "mit", "apache-2.0"),
)


def licences_of(origin: Origin) -> tuple[Licence, ...]:
    """Return every licence that a model stands under: its card's own, and those of what it was distilled into. Empty: unknown."""
    names = " ".join((origin.base, *origin.bases)).lower()
    wanted = [origin.license.lower()] if origin.license else []
    for mark, own, below in _DISTILLS:
        if mark in names:
            wanted += [own, below] if not wanted else [below]
    found = []
    for name in dict.fromkeys(wanted):
        known = _KNOWN.get(name)
        if known is None:
            label, link = origin.license_name or name, origin.license_link
            duties = ("Read the licence before you pass the model on." + (f" It is at {link}." if link else ""),)
            known = Licence(id=name, name=label, link=link, duties=duties)
        found.append(known if known.link or not origin.license_link else replace(known, link=origin.license_link))
    return tuple(found)
