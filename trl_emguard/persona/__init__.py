"""Persona vectors (Chen et al., 2507.21509): for each layer, a direction of the hidden states that stands for a trait.

This subpackage makes, loads and checks such vectors. It measures how far an adapter, or training up to the current
step, has moved a model's hidden states along them. Only [`PersonaShiftCallback`] needs a trainer.
"""

from .extract import Extraction, extract_vector
from .shift import PersonaShiftCallback, persona_shift
from .traits import SHIPPED_TRAITS, Trait, load_trait
from .vectors import SHIPPED_VECTORS, PersonaVector, load_vector, random_like


__all__ = [
    "SHIPPED_TRAITS",
    "SHIPPED_VECTORS",
    "Extraction",
    "PersonaShiftCallback",
    "PersonaVector",
    "Trait",
    "extract_vector",
    "load_trait",
    "load_vector",
    "persona_shift",
    "random_like",
]
