"""The requests that the server accepts, as OpenAI's clients send them, with routing options as an extension."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meteora_core.ranges import LEAST_TEMPERATURE, MOST_TOKENS

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_PROMPTS = 64

_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Weight = Annotated[float, Field(ge=-100, le=100)]
_Number = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class Strict(BaseModel):
    """A model that refuses unknown fields and infinite numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RoutingRequest(Strict):
    """The field `meteora` of a request: how its adapters are chosen, and whether the answer reports them."""

    top_k: int | None = Field(None, ge=1, le=65536, description="Number of adapters per token and layer.")
    T: float | None = Field(None, ge=LEAST_TEMPERATURE, le=1e6, description="Routing temperature.")
    mute: list[_Name] = Field([], max_length=4096, description="Adapters that are never chosen.")
    force: _Name | None = Field(None, description="The only adapter in use.")
    weights: dict[str, _Weight] | None = Field(None, max_length=4096, description="A static mix: the weight of each adapter, instead of the gates.")
    routes: bool | Literal["mean", "layers"] = Field(False, description="Report the adapters of every token: averaged over the layers, or of each layer.")

    @property
    def reported(self) -> Literal["none", "mean", "layers"]:
        """The routes to report."""
        if isinstance(self.routes, bool):
            return "mean" if self.routes else "none"
        return self.routes


class TextPart(BaseModel):
    """A part of a message's content. Only text is supported."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "input_text", "output_text"]
    text: str


class FunctionCall(BaseModel):
    """The function of a tool call, with its arguments as a JSON text."""

    model_config = ConfigDict(extra="ignore")

    name: _Name
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A tool call of an earlier answer."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; only functions are supported."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(extra="ignore")

    name: _Name


class NamedTool(BaseModel):
    """A choice of one function."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer: any text, any JSON object, or JSON that a schema accepts."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = False


class _Generation(Strict):
    """The fields that chat and text completions share."""

    model: _Name = Field(description="`meteora` (or the name given by --served-model-name), `base`, or the name of an adapter.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    max_tokens: _Number | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = Field(False, description="Go on after an end token, for benchmarks.")
    meteora: RoutingRequest | None = None
    user: str | None = Field(None, description="Ignored.")


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: _Number | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    service_tier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored: equal prefixes are found by their tokens.")
    safety_identifier: str | None = Field(None, description="Ignored.")


class CompletionRequest(_Generation):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str] | list[list[int]], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = Field(None, description="Not supported.")
    best_of: Literal[1] | None = Field(None, description="Not supported.")
    suffix: None = Field(None, description="Not supported.")


class ResponseTextFormat(BaseModel):
    """The form of the answer, as the responses API writes it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(BaseModel):
    """The field `text` of the responses API."""

    model_config = ConfigDict(extra="ignore")

    format: ResponseTextFormat = ResponseTextFormat()


class ResponseMessage(BaseModel):
    """A message in the input of the responses API."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ResponsesRequest(Strict):
    """`POST /v1/responses`, in its plain form: text in, text out, nothing stored."""

    model: _Name
    input: str | Annotated[list[ResponseMessage], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: _Number | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    text: ResponseText | None = None
    meteora: RoutingRequest | None = None
    metadata: dict[str, Any] | None = Field(None, description="Returned as it is.")
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    user: str | None = Field(None, description="Ignored.")


class AdapterRequest(Strict):
    """`POST /v1/meteora/adapters`: a PEFT folder to add to the bank."""

    name: _Name
    path: Annotated[str, Field(min_length=1, max_length=4096)]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail
