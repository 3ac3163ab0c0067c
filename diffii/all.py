"The names that a session needs, in one import: `from diffii.all import *`."

from .base.backbones import PRESETS, preset, build_model
from .base.files import UserError
from .base.images import ImageSet, image_folder, image_table, few_shot, halve
from .base.methods import METHODS, get_method
from .base.pipeline import Pipeline, load_pipeline
from .base.settings import (
    ClassifierSettings,
    ConceptSettings,
    FAST,
    InversionSettings,
    SamplingSettings,
)
from .data.aviary import aviary_set, waterbirds_twin
from .data.digits import digits_set, digit_suffixes
from .data.paper_sets import DATASETS, paper_dataset
from .data.sets import DataSet, shipped_set
from .method.classifier import train_classifier, evaluate
from .method.concepts import Concepts, learn_concepts, named_concepts
from .method.denoising import two_stage_denoise
from .method.diffusion import ddim_grid, ddim_step
from .method.interpolation import slerp, draw_pairs, draw_strength
from .method.inversion import InversionPool, ddim_invert, invert_images, latent_stats
from .method.suffixes import (
    make_suffixes,
    read_suffixes,
    published_suffixes,
    captions_of,
)
from .method.synthesis import soft_targets
from .run.captioners import (
    choose_suffixes,
    parse_suffixes,
    get_captioner,
    get_summariser,
)
from .run.concept_files import export_concepts, import_concepts, open_concepts
from .run.pools import build_pool, load_pool, save_pool
from .run.runs import (
    SyntheticSet,
    synthesize,
    load_synthetic,
    load_concepts,
    remake,
)
from .evaluation.experiments import benchmark, show_results
from .evaluation.long_tail import (
    CMO,
    DRW,
    long_tail,
    long_tail_callbacks,
    long_tail_counts,
    shot_groups,
    group_accuracy,
)
from .evaluation.metrics import (
    lpips_diversity,
    faithfulness,
    clip_score,
    features,
    precision_recall,
    fid,
    spread,
)
from .start.demo import demo

__all__ = sorted(n for n in globals() if not n.startswith('_'))
