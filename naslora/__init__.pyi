"""The names of the package, for type checkers and for ``lazy_loader``."""

from .adapter.io.base_state import base_state_dict as base_state_dict
from .adapter.io.base_state import load_base_state_dict as load_base_state_dict
from .adapter.io.merged_files import load_merged as load_merged
from .adapter.io.merged_files import save_merged as save_merged
from .adapter.io.named import active_adapter as active_adapter
from .adapter.io.named import add_adapter as add_adapter
from .adapter.io.named import disable_adapter as disable_adapter
from .adapter.io.named import set_adapter as set_adapter
from .adapter.io.storage import save_adapter as save_adapter
from .adapter.layer.alpha_search import AlphaSearch as AlphaSearch
from .adapter.layer.alpha_search import param_groups as param_groups
from .adapter.layer.alpha_search import print_trainable_parameters as print_trainable_parameters
from .adapter.layer.alpha_search import weight_parameters as weight_parameters
from .adapter.layer.config import NASLoRAConfig as NASLoRAConfig
from .adapter.layer.injection import inject as inject
from .adapter.layer.layer import NASLoRALinear as NASLoRALinear
from .adapter.layer.modules import adapter_parameters as adapter_parameters
from .adapter.layer.modules import arch_parameters as arch_parameters
from .adapter.merging.merge import merge as merge
from .adapter.merging.merged import unmerge as unmerge
from .adapter.merging.report import MergeReport as MergeReport
from .errors import UserError as UserError
from .methods import load_adapter as load_adapter
from .sam.attention import fuse_attention as fuse_attention
from .sam.attention import unfuse_attention as unfuse_attention

__version__: str
