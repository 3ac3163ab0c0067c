"The names that a session needs, in one import: `from diffii.all import *`."

from .base.backbones import PRESETS, build_model, preset
from .base.files import UserError
from .base.images import ImageSet, few_shot, halve, image_folder, image_table
from .base.methods import METHODS, get_method
from .base.pictures import grid, show_images
from .base.pipeline import Pipeline, load_pipeline
from .base.settings import (
    BenchmarkSettings,
    ClassifierSettings,
    ConceptSettings,
    ContextSettings,
    EditSettings,
    FAST,
    FilterSettings,
    GuideSettings,
    ImageSettings,
    InversionSettings,
    ModelSettings,
    PushSettings,
    RunSettings,
    SamplingSettings,
    Settings,
    TrainSettings,
    TuneSettings,
)
from .data.aviary import aviary_set, waterbirds_twin
from .data.digits import digit_suffixes, digits_set
from .data.paper_sets import DATASETS, paper_dataset
from .data.sets import DataSet, shipped_set
from .method.classifier import evaluate, train_classifier
from .method.concepts import Concepts, named_concepts
from .method.denoising import two_stage_denoise
from .method.diffusion import ddim_grid, ddim_step
from .method.few_step import FewStep, open_few_step
from .method.interpolation import draw_pairs, draw_strength, slerp
from .method.inversion import InversionPool, ddim_invert, invert_images, latent_stats
from .method.learning import learn_concepts
from .method.suffixes import (
    captions_of,
    make_suffixes,
    published_suffixes,
    read_suffixes,
)
from .method.synthesis import circle_strip, soft_targets
from .run.contexts import choose_suffixes, get_captioner, get_summariser
from .run.concept_files import export_concepts, import_concepts, open_concepts
from .run.planning import plan_run
from .run.pools import build_pool, load_pool, save_pool
from .run.summarisers import parse_suffixes
from .run.dropping import drop, drop_worst, keep, refill, score
from .run.review import load_concepts, remake, status
from .run.sharing import push
from .run.runs import SyntheticSet, load_synthetic, synthesize
from .evaluation.classifier_files import load_classifier, save_classifier
from .evaluation.experiments import benchmark
from .evaluation.claims import claims_on
from .evaluation.gallery import write_review
from .evaluation.long_tail import (
    CMO,
    DRW,
    group_accuracy,
    long_tail,
    long_tail_callbacks,
    long_tail_counts,
    shot_groups,
)
from .evaluation.metrics import (
    class_consistency,
    clip_score,
    features,
    fid,
    lpips_diversity,
    precision_recall,
    spread,
)
from .evaluation.statistics import decide, holm, paired
from .evaluation.training import compare_training
from .evaluation.tuning import tune
from .evaluation.verdicts import Page, show_results
from .start.demo import demo

__all__ = sorted(name for name in globals() if not name.startswith('_'))
