"""Fine-tuning: adapters over packed weights, and quantization-aware training."""

from qjax.train.adapters import load_adapter as load_adapter
from qjax.train.adapters import save_adapter as save_adapter
from qjax.train.adapters import save_base as save_base
from qjax.train.config import Finetune as Finetune
from qjax.train.data import Data as Data
from qjax.train.data import load_data as load_data
from qjax.train.data import make_batches as make_batches
from qjax.train.data import make_eval_batches as make_eval_batches
from qjax.train.lora import LoRA as LoRA
from qjax.train.lora import adapter_tree as adapter_tree
from qjax.train.lora import attach as attach
from qjax.train.lora import detach as detach
from qjax.train.lora import load_adapter_tree as load_adapter_tree
from qjax.train.merge import MergeReport as MergeReport
from qjax.train.merge import merge as merge
from qjax.train.merge import merge_checkpoint as merge_checkpoint
from qjax.train.mesh import Mesh as Mesh
from qjax.train.mesh import make_mesh as make_mesh
from qjax.train.optimizers import Optimizer as Optimizer
from qjax.train.optimizers import make_optimizer as make_optimizer
from qjax.train.qat import QAT as QAT
from qjax.train.qat import convert as convert
from qjax.train.qat import prepare as prepare
from qjax.train.run import finetune as finetune
from qjax.train.step import Step as Step
from qjax.train.step import TrainState as TrainState
