# What people import, what _target_ in a yaml names, and what saved runs and models name. Where it stands may change.

from .analysis.extrapolation import LengthTest as LengthTest
from .analysis.perplexity import DocumentTest as DocumentTest
from .core.errors import UserError as UserError
from .models.answerer import Answerer as Answerer
from .models.backbone import Decoder as Decoder
from .models.backbone import Encoder as Encoder
from .models.backbone import Pretrained as Pretrained
from .models.baselines.full_attention import FullAttention as FullAttention
from .models.baselines.lstm import LSTM as LSTM
from .models.baselines.memory_network import MemoryNetwork as MemoryNetwork
from .models.baselines.ntm import NeuralTuringMachine as NeuralTuringMachine
from .models.generation import generate as generate
from .models.recurrence import Segment as Segment
from .models.recurrence import unroll as unroll
from .models.rmt import RMTDecoder as RMTDecoder
from .models.rmt import RMTEncoder as RMTEncoder
from .models.segment_model import SegmentModel as SegmentModel
from .models.tiny import TinyBert as TinyBert
from .models.tiny import TinyBigBird as TinyBigBird
from .models.tiny import TinyGPT as TinyGPT
from .models.tiny import TinyLongformer as TinyLongformer
from .models.tiny import TinyRoFormer as TinyRoFormer
from .models.transformer_xl import TransformerXL as TransformerXL
from .tasks.datamodule import FactDataModule as FactDataModule
from .tasks.facts import Babi as Babi
from .tasks.facts import Carried as Carried
from .tasks.facts import Detect as Detect
from .tasks.facts import Memorize as Memorize
from .tasks.facts import Reasoning as Reasoning
from .tasks.language import DocumentDataModule as DocumentDataModule
from .tasks.language import LanguageModeling as LanguageModeling
from .tasks.language import RunningText as RunningText
from .tasks.noise import Files as Files
from .tasks.noise import Hub as Hub
from .tasks.noise import Prose as Prose
from .tasks.placement import Placement as Placement
from .training.callbacks.wandb_run import WandbRun as WandbRun
from .training.classification import FactClassifier as FactClassifier
from .training.generation import FactGenerator as FactGenerator
from .training.language_modeling import LanguageModeler as LanguageModeler
from .training.optimization import WarmupDecay as WarmupDecay
from .training.phases.curriculum import FixedSteps as FixedSteps
from .training.phases.curriculum import SegmentCurriculum as SegmentCurriculum
from .training.phases.state_passing import StatePassing as StatePassing

__version__: str
