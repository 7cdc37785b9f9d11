"""What tests of fuse() compare, and how they call it."""

import warnings


def description(model):
    """All that fuse() must leave alone in a model that it does not change."""
    modules = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
    tensors = [(k, id(v), v._version) for k, v in [*model.named_parameters()]]
    return modules, tensors, [*model.state_dict()]


def without_warning(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)
