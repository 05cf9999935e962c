"""`indexer doctor`: is everything as it must be? Settings, database, nodes and what runs, a check at a time; it changes
nothing, and one that hangs keeps nobody from the next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from indexer import doctor_database, doctor_nodes, log, registry
from indexer.config import Settings
from indexer.doctor_finding import Checkup, Finding, Verdict, fail, ok, warn
from indexer.errors import ConfigError, HookLoadError, IndexerError
from indexer.registry import Registered
from indexer.settings_sources import load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from indexer.model import BlockSource
    from indexer.sources.contracts import Contracts

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
# sections that only a sidecar reads
_SIDECAR_SECTIONS = frozenset({"sidecar", "providers", "auth", "listening"})


def main(config: Path | None, secrets: Path | None, seconds: float, console: Console | None) -> int:
    """Run all checks and print what they find: to the console as it comes, else as JSON. Returns the exit code."""
    checkup = Checkup(seconds, lambda one: _tell(console, one) if console is not None else None)
    asyncio.run(examine(checkup, config, secrets))
    counts = {state: sum(one.state == state for one in checkup.findings) for state in _STYLES}
    if console is None:
        facts = {"well": not checkup.failed, **counts, "checks": [msgspec.to_builtins(one) for one in checkup.findings]}
        print(msgspec.json.encode(facts).decode())
    else:
        console.print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed", style="bold")
    return 1 if checkup.failed else 0


def _tell(console: Console, one: Finding) -> None:
    from rich.text import Text

    what = f"{one.group}: {one.check}"
    console.print(Text.assemble((f"{one.state:<5}", _STYLES[one.state]), f"{what:<28} {one.reason}"))
    if one.advice and one.state != "ok":
        console.print(Text(f"{'':5}{'':28} -> {one.advice}", style="dim"))


async def examine(checkup: Checkup, config: Path | None, secrets: Path | None) -> None:
    """All checks. Without settings there is nothing else to check."""
    try:
        settings = load_settings(config, secrets).settings
    except ConfigError as error:
        checkup.add("settings", "file", fail(str(error), "mend it where it says; README, Settings, lists all of them"))
        return
    checkup.add("settings", "file", ok("they are well-formed"))
    # what the parts log on their way is in the findings, too
    log.configure(settings.log.model_copy(update={"level": "error"}))
    hooks = _hooks(checkup, settings)
    source = _source(checkup, settings, hooks)
    try:
        sidecar = bool(_SIDECAR_SECTIONS & settings.model_fields_set)
        if sidecar:
            for check, verdict in _sidecar(settings).items():
                checkup.add("sidecar", check, verdict)
            for provider, url in _addresses(settings).items():
                advice = "look at its address in the settings and at this machine's DNS"
                await checkup.run("sidecar", f"address of {provider}", _resolved(url), advice)
        # a source that can't be made says nothing: only EVM chains reorganise
        undoable = settings.chain.source == "evm" if source is None else not source.instant
        known = await doctor_database.examine(checkup, settings, hooks, undoable=undoable, sidecar=sidecar)
        if settings.chain.source == "recorded":
            _recorded(checkup, source, settings, known)
        else:
            contracts: Contracts | None = getattr(source, "contracts", None)
            await doctor_nodes.examine(checkup, settings, contracts, known)
    finally:
        if source is not None:
            await source.close()


def _hooks(checkup: Checkup, settings: Settings) -> tuple[Registered, ...]:
    try:
        hooks = registry.load_hooks(settings.hooks)
    except IndexerError as error:
        traceback = " (its traceback: indexer migrate --dry-run)" if isinstance(error, HookLoadError) else ""
        checkup.add("settings", "hooks", fail(str(error), f"mend hooks.enabled, or the hook{traceback}"))
        return ()
    if not hooks:
        checkup.add("settings", "hooks", warn("none is enabled", 'name some in hooks.enabled, as "module:attribute"'))
    else:
        checkup.add("settings", "hooks", ok(", ".join(one.name for one in hooks)))
    return hooks


def _source(checkup: Checkup, settings: Settings, hooks: Sequence[Registered]) -> BlockSource | None:
    """The source, if it can be made: that reads ABIs, or the file of blocks."""
    from indexer.sources.choose import make_source

    try:
        source = make_source(settings)
    except IndexerError as error:
        checkup.add("settings", "source", fail(str(error), "mend [chain] and [[contracts]]"))
        return None
    try:
        registry.check_events(hooks, source.events)
    except IndexerError as error:
        checkup.add("settings", "source", fail(str(error), "mend [[contracts]], or the hook's settings"))
    else:
        checkup.add("settings", "source", ok(f"{settings.chain.source}, with {', '.join(sorted(source.events))}"))
    return source


def _recorded(checkup: Checkup, source: Any, settings: Settings, known: doctor_nodes.Known) -> None:
    from indexer.sources.recorded import RecordedSource

    if isinstance(source, RecordedSource):  # else it has been said why not
        doctor_nodes.recorded(checkup, source, settings, known)


# -- the sidecar's needs -------------------------------------------------------------------------------------------


def _sidecar(settings: Settings) -> Mapping[str, Verdict]:
    """What is set and what is missing; never what it is set to."""
    auth, providers = settings.auth, settings.providers
    tokens = auth.jwt_secret is not None or auth.jwks_url is not None
    found = {
        "bearer tokens": ok("can be checked") if tokens
        else warn("can't be checked: callers need API keys", "set auth.jwt_secret or auth.jwks_url"),
        "cron secret": ok("is set") if auth.cron_secret is not None
        else warn("is not set: the internal routes refuse everybody", "set auth.cron_secret"),
        "providers": _providers(settings),
    }  # fmt: skip
    if "listening" in settings.model_fields_set:
        found["listening"] = _listening(settings)
    if providers.stripe.api_key is not None and None in (providers.stripe.success_url, providers.stripe.cancel_url):
        lacking = "Stripe has a key, but no address to send people back to"
        found["cards"] = warn(lacking, "set providers.stripe.success_url and cancel_url")
    return found


def _providers(settings: Settings) -> Verdict:
    apify, spotify = settings.providers.apify, settings.providers.spotify
    halves = []
    if (apify.token is None) != (apify.actor is None):
        halves.append("providers.apify needs token and actor")
    if (spotify.client_id is None) != (spotify.client_secret is None):
        halves.append("providers.spotify needs client_id and client_secret")
    if halves:
        return fail(f"half set: {'; '.join(halves)}", "set both or neither")
    names = sorted(_keyed(settings))
    return ok(f"with keys: {', '.join(names)}" if names else "none has a key, so none is asked")


def _listening(settings: Settings) -> Verdict:
    listening, spotify = settings.listening, settings.providers.spotify
    if listening.token_key is None:
        return fail("people's tokens can't be encrypted, so nobody can connect", "set listening.token_key")
    if spotify.client_id is None or spotify.client_secret is None:
        return fail("there is no Spotify application", "set providers.spotify.client_id and client_secret")
    if urlsplit(listening.public_url).scheme != "https":
        return warn("listening.public_url is no https address", "people's browsers need one, but on this machine")
    return ok("its key is set")


def _keyed(settings: Settings) -> dict[str, str]:
    """The providers that are asked at all, as they have keys, with their addresses."""
    providers = settings.providers
    every = {
        "songstats": (providers.songstats.api_key, providers.songstats.base_url),
        "apify": (providers.apify.token, providers.apify.base_url),
        "spotify": (providers.spotify.client_secret, providers.spotify.base_url),
        "stripe": (providers.stripe.api_key, providers.stripe.base_url),
    }
    return {name: url for name, (key, url) in every.items() if key is not None}


def _addresses(settings: Settings) -> dict[str, str]:
    found = _keyed(settings)
    if "spotify" in found:
        found["spotify accounts"] = settings.providers.spotify.accounts_url
    if settings.auth.jwks_url is not None:
        found["the public keys"] = settings.auth.jwks_url
    return found


async def _resolved(url: str) -> Verdict:
    parts = urlsplit(url)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 443)
    except OSError as error:
        return fail(f"{parts.hostname} is not found ({error.strerror or type(error).__name__})")
    return ok(f"{parts.hostname} has {len({one[4][0] for one in found})} addresses")
