"""All messages on the wire: one module per direction, and one union per socket.

`codec` turns messages into frames. A message that carries tensors has a field `tensors`, with one
spec per raw frame after the header. Messages about work carry the `epoch` of their plan and, where
it matters, the `step`, so that late ones are recognised and dropped.
"""

from distributed_llm.common.messages.base import (
    MAX_STAGES,
    MAX_TENSORS,
    PROTOCOL_VERSION,
    Address,
    Addresses,
    Bandwidth,
    Capabilities,
    FetchProgress,
    Flops,
    Label,
    Message,
    Microseconds,
    Name,
    RequestId,
    StageTime,
    StageTimes,
    Tensors,
    Text,
    Value,
    tag_of,
)
from distributed_llm.common.messages.between_workers import (
    MAX_PIECES,
    KVEnd,
    KVPart,
    KVPieces,
    KVTaken,
    PeerHello,
    PeerProbe,
    PeerProbed,
    PeerWelcome,
    StatePart,
)
from distributed_llm.common.messages.from_client import (
    MAX_CHAT_MESSAGES,
    MAX_JSON_CHARS,
    Cancel,
    Chat,
    ChatMessage,
    ClientHello,
    CreateToken,
    DecodeTokens,
    DescribeModel,
    DrainWorker,
    Embed,
    EncodePrompt,
    Enrol,
    Generate,
    GetMembers,
    GetStatus,
    Ping,
    ReadmitMachine,
    RemoveMachine,
    RevokeToken,
    ToolCall,
)
from distributed_llm.common.messages.from_worker import (
    NOT_SERVED,
    Goodbye,
    HandedOver,
    Heartbeat,
    KVCopied,
    KVFailed,
    Leaving,
    LinkReport,
    MissingPositions,
    NotUnderstood,
    Remeasured,
    StageFailed,
    StageReady,
    StageTrial,
    TaskFailed,
    TaskResult,
    WorkerHello,
)
from distributed_llm.common.messages.of_status import (
    ClusterStatus,
    Counters,
    EventStatus,
    ForecastStatus,
    HeldLayers,
    Histogram,
    Latencies,
    LinkStatus,
    MoveStatus,
    PipelineStatus,
    StageStatus,
    WorkerStatus,
)
from distributed_llm.common.messages.of_weights import (
    MAX_CHUNK_BYTES,
    Chunk,
    DigestsReport,
    GetDigests,
    GetModel,
    ModelDescription,
    ModelReport,
    NoChunk,
    ReadChunk,
    Sha256,
    TensorDescription,
    TensorDigests,
)
from distributed_llm.common.messages.to_anybody import (
    Pong,
    Refused,
)
from distributed_llm.common.messages.to_client import (
    MAX_SPELLING,
    MAX_TRACED,
    ClientWelcome,
    ClusterMembers,
    Embedded,
    Enrolled,
    Finished,
    FinishReason,
    MachineStatus,
    MembersReport,
    ModelDescribed,
    ModelInfo,
    PromptEncoded,
    RequestFailed,
    Spelling,
    StageHop,
    StageTiming,
    StatusReport,
    StepTrace,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokensDecoded,
    TokenStatus,
    Usage,
    WorkerDrained,
)
from distributed_llm.common.messages.to_worker import (
    MAX_RANGES,
    MAX_RELEASED,
    MAX_SLICES,
    MAX_SOURCES,
    CopyKV,
    DropStage,
    GiveWeights,
    HandOver,
    KVTransfer,
    LoadStage,
    MayLeave,
    ModelSource,
    NextStage,
    Notice,
    ReleaseSequences,
    Renamed,
    SeenFrom,
    SequenceIds,
    SequenceSlice,
    SharedPrefix,
    Task,
    UndoMove,
    WeightSource,
    Welcome,
)

__all__ = [
    "MAX_CHAT_MESSAGES",
    "MAX_CHUNK_BYTES",
    "MAX_JSON_CHARS",
    "MAX_PIECES",
    "MAX_RANGES",
    "MAX_RELEASED",
    "MAX_SLICES",
    "MAX_SOURCES",
    "MAX_SPELLING",
    "MAX_STAGES",
    "MAX_TENSORS",
    "MAX_TRACED",
    "NOT_SERVED",
    "PROTOCOL_VERSION",
    "Address",
    "Addresses",
    "AnyMessage",
    "Bandwidth",
    "Cancel",
    "Capabilities",
    "Chat",
    "ChatMessage",
    "Chunk",
    "ClientHello",
    "ClientRequest",
    "ClientWelcome",
    "ClusterMembers",
    "ClusterStatus",
    "CopyKV",
    "Counters",
    "CreateToken",
    "DecodeTokens",
    "DescribeModel",
    "DigestsReport",
    "DrainWorker",
    "DropStage",
    "Embed",
    "Embedded",
    "EncodePrompt",
    "Enrol",
    "Enrolled",
    "EventStatus",
    "FetchProgress",
    "FinishReason",
    "Finished",
    "Flops",
    "ForecastStatus",
    "FromClient",
    "FromWorker",
    "Generate",
    "GetDigests",
    "GetMembers",
    "GetModel",
    "GetStatus",
    "GiveWeights",
    "Goodbye",
    "HandOver",
    "HandedOver",
    "Heartbeat",
    "HeldLayers",
    "Histogram",
    "KVCopied",
    "KVEnd",
    "KVFailed",
    "KVPart",
    "KVPieces",
    "KVTaken",
    "KVTransfer",
    "Label",
    "Latencies",
    "Leaving",
    "LinkReport",
    "LinkStatus",
    "LoadStage",
    "MachineStatus",
    "MayLeave",
    "MembersReport",
    "Message",
    "Microseconds",
    "MissingPositions",
    "ModelDescribed",
    "ModelDescription",
    "ModelInfo",
    "ModelReport",
    "ModelSource",
    "MoveStatus",
    "Name",
    "NextStage",
    "NoChunk",
    "NotUnderstood",
    "Notice",
    "PeerHello",
    "PeerProbe",
    "PeerProbed",
    "PeerWelcome",
    "Ping",
    "PipelineStatus",
    "Pong",
    "PromptEncoded",
    "ReadChunk",
    "ReadmitMachine",
    "Refused",
    "ReleaseSequences",
    "Remeasured",
    "RemoveMachine",
    "Renamed",
    "RequestFailed",
    "RequestId",
    "RevokeToken",
    "SeenFrom",
    "SequenceIds",
    "SequenceSlice",
    "Sha256",
    "SharedPrefix",
    "Spelling",
    "StageFailed",
    "StageHop",
    "StageReady",
    "StageStatus",
    "StageTime",
    "StageTimes",
    "StageTiming",
    "StageTrial",
    "StatePart",
    "StatusReport",
    "StepTrace",
    "Task",
    "TaskFailed",
    "TaskResult",
    "TensorDescription",
    "TensorDigests",
    "Tensors",
    "Text",
    "Timings",
    "ToClient",
    "ToCoordinator",
    "ToNextWorker",
    "ToPreviousWorker",
    "ToReader",
    "ToWorker",
    "TokenChunk",
    "TokenLogprobs",
    "TokenStatus",
    "TokensDecoded",
    "ToolCall",
    "UndoMove",
    "Usage",
    "Value",
    "WeightRequest",
    "WeightSource",
    "Welcome",
    "WorkerDrained",
    "WorkerHello",
    "WorkerReport",
    "WorkerStatus",
    "tag_of",
]

WorkerReport = (
    Heartbeat
    | StageReady
    | StageFailed
    | TaskResult
    | TaskFailed
    | NotUnderstood
    | LinkReport
    | Remeasured
    | KVCopied
    | HandedOver
    | KVFailed
    | Leaving
)
"""Messages that only a welcomed worker may send."""

ClientRequest = (
    Generate
    | Embed
    | EncodePrompt
    | DecodeTokens
    | Cancel
    | DescribeModel
    | GetStatus
    | DrainWorker
    | GetMembers
    | CreateToken
    | RevokeToken
    | RemoveMachine
    | ReadmitMachine
    | Ping
)
"""Messages that only a welcomed client may send."""

WeightRequest = GetModel | GetDigests | ReadChunk
"""What a worker asks the coordinator over a connection on which it says no hello."""

FromWorker = WorkerHello | WorkerReport | Goodbye
FromClient = Enrol | ClientHello | ClientRequest
ToCoordinator = FromWorker | FromClient
ToWorker = (
    Welcome
    | Renamed
    | LoadStage
    | GiveWeights
    | CopyKV
    | HandOver
    | UndoMove
    | DropStage
    | Task
    | ReleaseSequences
    | MayLeave
    | Notice
    | Pong
    | Refused
)
ToClient = (
    Enrolled
    | ClientWelcome
    | TokenChunk
    | Finished
    | Embedded
    | PromptEncoded
    | TokensDecoded
    | RequestFailed
    | ModelDescribed
    | StatusReport
    | WorkerDrained
    | MembersReport
    | Pong
    | Refused
)
ToNextWorker = PeerHello | PeerProbe | Task | KVPieces | KVEnd
ToPreviousWorker = PeerWelcome | PeerProbed | KVTaken
ToReader = ModelReport | DigestsReport | Chunk | NoChunk | Pong | Refused
"""What answers a worker that reads weights."""

AnyMessage = (
    ToCoordinator | WeightRequest | ToWorker | ToClient | ToNextWorker | ToPreviousWorker | ToReader
)
