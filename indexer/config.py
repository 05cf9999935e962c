"""Settings: a TOML file, the environment (INDEXER_SECTION__NAME) and a folder of secrets; read once, in cli.py.

Here is what can be set; `settings_sources.load_settings` reads it, `config_report` shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, le=86_400)]


def shown_url(url: str) -> str:
    """The part of an address that may be shown: scheme, host and port; never user, path or query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port is not None else "")


def _check_address(value: SecretStr, schemes: tuple[str, ...]) -> SecretStr:
    """Texts of errors never quote the address, nor do those of urlsplit get through: they quote its host or port."""
    text, wanted = value.get_secret_value(), " or ".join(f"{scheme}://" for scheme in schemes)
    if not text.lower().startswith(tuple(f"{scheme}://" for scheme in schemes)):
        raise ValueError(f"must begin with {wanted}")
    if any(character.isspace() for character in text):
        raise ValueError("must not hold white space")
    return value


def _check_host(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    try:
        parts, shown = urlsplit(text), shown_url(text)
    except ValueError:
        raise ValueError("is no valid address: look at its host and port") from None
    if not parts.hostname:
        raise ValueError("has no host")
    # An unescaped / ? or # in a password moves the rest of it out of the part that shown_url leaves out.
    if "@" in text.replace(parts.netloc, "", 1) or "@" in shown:
        raise ValueError("holds an @ after its host: write / ? # @ in a password as %2F %3F %23 %40")
    return value


def _postgres(value: SecretStr) -> SecretStr:
    return _check_address(value, ("postgresql", "postgres"))


def _http(value: SecretStr) -> SecretStr:
    return _check_host(_check_address(value, ("http", "https")))


def _api(value: str) -> str:
    """The address of a public API: nothing in it is secret, so it may be shown, and so no key may stand in it."""
    parts = urlsplit(_http(SecretStr(value)).get_secret_value())
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must hold no user, password, query or fragment")
    return value


def _websocket(value: SecretStr) -> SecretStr:
    return _check_host(_check_address(value, ("ws", "wss")))


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _file_or_signatures(value: Any) -> Any:
    # Said here, since a union's own errors name its members instead of the setting.
    if isinstance(value, (str, Path)) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError("must be the name of a file or a list of signatures")


def _long_secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value().encode()) < 32:
        raise ValueError("must be 32 bytes long at least: a shorter one can be guessed from any token")
    return value


def _origin(value: str) -> str:
    if value != "*" and value != shown_url(_api(value)):
        raise ValueError('must be an origin (scheme, host and port alone: https://app.example), or "*"')
    return value


PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres)]
HttpUrl = Annotated[SecretStr, AfterValidator(_http)]
WebsocketUrl = Annotated[SecretStr, AfterValidator(_websocket)]
ApiUrl = Annotated[str, AfterValidator(_api)]
Key = Annotated[SecretStr, Field(min_length=1)]


class Section(BaseModel):
    """Base of the sections: unknown names are errors, nothing changes after loading, errors quote no value."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DatabaseSettings(Section):
    url: PostgresUrl | None = Field(
        default=None, description="postgresql:// address; without one an embedded server is started"
    )
    schema_: str = Field(default="public", alias="schema", description="schema of the hooks' tables")
    pool_size: int = Field(default=6, ge=2, le=100, description="connections of the pool beside the writer's own")
    connect_timeout_seconds: Seconds = Field(default=10.0, description="time to get a connection before giving up")
    command_timeout_seconds: Seconds = Field(default=60.0, description="time that one statement may take")
    data_dir: Path | None = Field(
        default=None, description="data of the embedded server; by default in the user's data folder"
    )


class EndpointSettings(Section):
    url: HttpUrl = Field(description="http(s) address of the node; may hold a key, never shown")
    ws: WebsocketUrl | None = Field(default=None, description="ws(s) address for new heads; polling without one")
    # No address in here: a name is shown everywhere.
    name: str | None = Field(
        default=None, pattern=r"^[^/?@]{1,64}$", description="name in logs and metrics; the host by default"
    )
    max_requests_per_second: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="pace of our requests; none by default"
    )

    @property
    def label(self) -> str:
        """What logs and metrics call the endpoint: its name, else its host, with the port if there is one."""
        return self.name or shown_url(self.url.get_secret_value()).partition("://")[2]


def _named_apart(endpoints: list[EndpointSettings]) -> list[EndpointSettings]:
    seen: dict[str, int] = {}
    for position, endpoint in enumerate(endpoints):
        if endpoint.label in seen:
            both = f"endpoints {seen[endpoint.label]} and {position} (counted from 0)"
            raise ValueError(f"{both} have the same name: give each its own (without one it is the host)")
        seen[endpoint.label] = position
    return endpoints


class ChainSettings(Section):
    name: str = Field(
        default="main", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="name of the chain in the database"
    )
    source: Literal["evm", "core", "recorded"] = Field(
        default="evm", description="kind of chain: evm, core (Open Audio) or recorded (a file of blocks)"
    )
    file: Path | None = Field(default=None, description="blocks as JSON lines, where the source is recorded")
    endpoints: Annotated[list[EndpointSettings], AfterValidator(_named_apart)] = Field(
        default=[], description="the nodes, in order of preference"
    )
    chain_id: str | None = Field(
        default=None, coerce_numbers_to_str=True, description="refuse any other chain; the first seen"
    )
    start_block: int | None = Field(default=None, ge=0, description="first block; the contracts' smallest by default")
    confirmations: int = Field(default=64, ge=0, description="finality where the node has no finalised tag, in blocks")
    poll_seconds: Seconds | None = Field(
        default=None, description="pause between questions for a new head; a quarter of the block time by default"
    )
    check_bloom: bool = Field(default=True, description="doubt empty logs that the header's bloom contradicts")
    requests_in_flight: int = Field(default=4, ge=1, le=64, description="ranges fetched ahead at the same time")
    request_timeout_seconds: Seconds = Field(default=30.0, description="time that one request may take")
    connect_timeout_seconds: Seconds = Field(default=10.0, description="time to reach a node at start before giving up")


class ContractSettings(Section):
    name: str = Field(default="", description="name of the contract, for people")
    address: Annotated[list[str], BeforeValidator(_one_or_many)] = Field(min_length=1, description="one or many")
    abi: Annotated[Path | list[str], BeforeValidator(_file_or_signatures)] = Field(
        description="ABI file (JSON), or a list of signatures: event Played(uint256 id, ...)"
    )
    events: list[str] = Field(default=[], description="names of the events wanted; all by default")
    start_block: int = Field(default=0, ge=0, description="block in which the contract was created")


class HookSettings(Section):
    """What the operator decides for each hook; the hook's own settings stand beside these."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)
    on_error: Literal["halt", "skip"] = Field(
        default="halt", description="when the hook fails: stop, or leave a visible hole"
    )
    retries: int = Field(default=0, ge=0, le=100, description="tries more before on_error is carried out")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # What a hook keeps there may be a secret, and we do not know which.
        return [(name, getattr(self, name)) for name in type(self).model_fields]


class HooksSettings(Section):
    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)
    __pydantic_extra__: dict[str, HookSettings] = Field(init=False)
    enabled: list[str] = Field(default=[], description='hooks as "module:attribute", in the order in which they run')


class SpanSettings(Section):
    max_events: int = Field(default=10_000, ge=1, description="events committed together while catching up")
    max_seconds: Seconds = Field(default=5.0, description="a span that takes longer makes the next ones smaller")
    max_blocks: int = Field(default=10_000, ge=1, description="blocks of one range, and of one span")


class HttpSettings(Section):
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=9464, ge=0, le=65_535, description="port of probes, metrics and page; 0 takes a free one")
    stall_seconds: Seconds = Field(default=120.0, description="blocks wait and none commits for so long: /livez fails")
    # An empty token would let in everybody who sends none.
    admin_token: SecretStr | None = Field(
        default=None, min_length=1, description="token for the buttons of the status page"
    )


class SongstatsSettings(Section):
    base_url: ApiUrl = Field(default="https://api.songstats.com", description="address of the API")
    api_key: Key | None = Field(default=None, description="key; without one nothing is asked")
    timeout_seconds: Seconds = Field(default=30.0, description="time that one request may take")
    monthly_budget: int | None = Field(default=None, ge=0, description="calls a calendar month (UTC); no limit without")
    rest_seconds: Seconds = Field(
        default=3_600.0, description="the drain's pause when the provider is saturated and names no time itself"
    )


class ApifySettings(Section):
    base_url: ApiUrl = Field(default="https://api.apify.com", description="address of the API")
    token: Key | None = Field(default=None, description="token; without one nothing is asked")
    actor: str | None = Field(
        default=None, pattern=r"^\w[\w.-]*([~/]\w[\w.-]*)?$",
        description="actor that reads albums' play counts: user/name"
    )
    albums_field: str = Field(default="albumIds", min_length=1, description="field of the actor's input for the albums")
    timeout_seconds: Seconds = Field(default=30.0, description="time that one request may take")
    run_seconds: Seconds = Field(default=1_800.0, description="time that one run of the actor may take")
    monthly_budget: float = Field(
        default=25.0, ge=0, allow_inf_nan=False, description="US dollars that one account may spend a month"
    )


class SpotifySettings(Section):
    base_url: ApiUrl = Field(default="https://api.spotify.com", description="address of the web API")
    accounts_url: ApiUrl = Field(default="https://accounts.spotify.com", description="address that gives tokens")
    client_id: str | None = Field(default=None, min_length=1, description="the application's id")
    client_secret: Key | None = Field(default=None, description="the application's secret")
    timeout_seconds: Seconds = Field(default=15.0, description="time that one request may take")


class StripeSettings(Section):
    base_url: ApiUrl = Field(default="https://api.stripe.com", description="address of the API")
    api_key: Key | None = Field(default=None, description="secret key; without one nothing is asked")
    success_url: HttpUrl | None = Field(default=None, description="where Checkout sends people who left a card")
    cancel_url: HttpUrl | None = Field(default=None, description="where Checkout sends people who left none")
    timeout_seconds: Seconds = Field(default=15.0, description="time that one request may take")


class ProvidersSettings(Section):
    songstats: SongstatsSettings = Field(default_factory=SongstatsSettings, description="play counts of the past")
    apify: ApifySettings = Field(default_factory=ApifySettings, description="play counts of today")
    spotify: SpotifySettings = Field(default_factory=SpotifySettings, description="albums, tracks and their ISRC")
    stripe: StripeSettings = Field(default_factory=StripeSettings, description="cards on file")


class ScheduleSettings(Section):
    cron: str | None = Field(default=None, description="times in UTC, as 17 3 * * *; those of the code by default")
    kind: str | None = Field(default=None, description="kind of the job; that of the code by default")
    payload: dict[str, Any] = Field(default={}, description="what the job is given")
    spread_seconds: float | None = Field(default=None, ge=0, description="window after the time in which it starts")
    catch_up: bool | None = Field(default=None, description="make up at the start for a time that was missed")
    enabled: bool = Field(default=True, description="false takes a schedule of the code away")


class SidecarSettings(Section):
    host: str = Field(default="127.0.0.1", description="address on which the API listens")
    port: int = Field(default=8080, ge=0, le=65_535, description="port of the API and its probes; 0 takes a free one")
    cors_origins: list[Annotated[str, AfterValidator(_origin)]] = Field(
        default=[], description='origins whose pages may call the API: https://app.example, or "*" for all'
    )
    body_bytes: int = Field(default=1 << 20, ge=1_024, le=1 << 26, description="largest body that is read")
    requests_per_minute: int = Field(default=60_000, ge=1, description="requests of one account, on each sidecar")
    burst: int = Field(default=2_000, ge=1, description="of these, at once")
    failures_per_minute: int = Field(default=30, ge=1, description="wrong keys and tokens from one address")
    trusted_proxies: int = Field(
        default=0, ge=0, le=10, description="reverse proxies before us: so many addresses of X-Forwarded-For are true"
    )
    jobs: list[str] = Field(default=[], description='kinds of job as "module:attribute", beside the built-in ones')
    concurrency: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={}, description="jobs of a kind at a time over all workers: kind = number; that of the code by default"
    )
    schedules: dict[str, ScheduleSettings] = Field(
        default={}, description="name = {cron, kind, payload, spread_seconds, catch_up, enabled}, over the code's"
    )
    max_running: int = Field(default=40, ge=2, le=1_000, description="jobs that one worker runs at a time")
    drain_seconds: float = Field(default=20.0, ge=0, le=3_600, description="time that running jobs get at a stop")
    heartbeat_timeout_seconds: Seconds = Field(
        default=3_600.0, description="a worker that is silent for so long is dead, and its jobs wait again"
    )
    max_worker_deaths: int = Field(default=3, ge=1, description="a job of which so many workers died is held")
    log_days: float = Field(default=7.0, gt=0, description="how long the ends of jobs are kept")


class AuthSettings(Section):
    jwt_secret: Annotated[SecretStr, AfterValidator(_long_secret)] | None = Field(
        default=None, description="secret of bearer tokens (HS256), 32 bytes at least"
    )
    jwks_url: ApiUrl | None = Field(
        default=None, description="where the public keys of bearer tokens are (RS256, ES256), instead of a secret"
    )
    jwt_audience: str | None = Field(default=None, min_length=1, description="what a token's aud must be")
    jwt_issuer: str | None = Field(default=None, min_length=1, description="what a token's iss must be")
    cron_secret: Key | None = Field(default=None, description="secret of the internal routes, which fail without one")

    @model_validator(mode="after")
    def _one_kind_of_token(self) -> AuthSettings:
        if self.jwt_secret is not None and self.jwks_url is not None:
            raise ValueError("takes jwt_secret or jwks_url, not both")
        return self


class ListeningSettings(Section):
    token_key: Annotated[SecretStr, AfterValidator(_long_secret)] | None = Field(
        default=None, description="encrypts people's tokens, signs their sessions; without it nobody can connect"
    )
    old_token_keys: list[Annotated[SecretStr, AfterValidator(_long_secret)]] = Field(
        default=[], description="earlier keys, until `indexer keys rotate-tokens` has run"
    )
    public_url: ApiUrl = Field(
        default="http://127.0.0.1:8080", description="where people's browsers reach the sidecar; https in production"
    )
    founding_cap: int = Field(default=100, ge=0, description="places; who comes later is on the waitlist")
    session_days: float = Field(default=30.0, gt=0, le=400, description="how long a sign-in lasts")
    visits_per_minute: int = Field(default=60, ge=1, description="requests of sign-in from one address")
    batch_size: int = Field(default=50, ge=1, le=50, description="people whom one job archives")
    people_at_once: int = Field(default=50, ge=1, le=200, description="people whom a process polls at the same time")
    person_seconds: Seconds = Field(default=60.0, description="time that one person's poll may take in all")
    breaker_failures: int = Field(
        default=10, ge=1, description="so many people in a row for whom Spotify can't be reached: it rests"
    )
    breaker_seconds: Seconds = Field(default=60.0, description="its rest, doubled each time up to 15 minutes")

    @property
    def redirect_url(self) -> str:
        """Where Spotify sends people back to; to be registered there."""
        return self.public_url.rstrip("/") + "/connect/spotify/callback"


class LogSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level shown")
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else json"
    )


class Settings(BaseSettings):
    """All settings. Built from its arguments alone: `load_settings` knows the sources."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    database: DatabaseSettings = Field(default_factory=DatabaseSettings, description="where rows and cursor are kept")
    chain: ChainSettings = Field(default_factory=ChainSettings, description="the chain that is followed")
    contracts: list[ContractSettings] = Field(default=[], description="the contracts whose events are read")
    hooks: HooksSettings = Field(default_factory=HooksSettings, description="what runs on the blocks")
    span: SpanSettings = Field(default_factory=SpanSettings, description="how many blocks are committed together")
    http: HttpSettings = Field(default_factory=HttpSettings, description="probes, metrics and status page")
    providers: ProvidersSettings = Field(
        default_factory=ProvidersSettings, description="the APIs that the sidecar asks"
    )
    sidecar: SidecarSettings = Field(default_factory=SidecarSettings, description="the worker of jobs, and its API")
    auth: AuthSettings = Field(default_factory=AuthSettings, description="who may call the API")
    listening: ListeningSettings = Field(
        default_factory=ListeningSettings, description="archiving people's Spotify history"
    )
    log: LogSettings = Field(default_factory=LogSettings, description="the log on standard error")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_others: Any,
        **_named: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: pydantic's own sources drop unknown names and forget which variable it was."""
        return (init_settings,)
