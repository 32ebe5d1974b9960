"""How the models stand in timm's registry: names, default configurations, and what timm's scripts pass to them."""
import sys

from .compat import feature_extractor, register_model

PATCH_SIZE = 16  # pixels a side that one token of the first stage stands for
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FIXED = {"in_chans": 3, "drop_rate": 0.0, "global_pool": "avg"}  # what timm's scripts ask every model for


def square_side(img_size, family, minimum):
    """The side in pixels, of `img_size` as it is or of a (height, width). Raises ValueError, in one sentence, unless
    they are equal, a multiple of 16 and at least `minimum`."""
    sides = set(img_size) if isinstance(img_size, (tuple, list)) else {img_size}
    side = sides.pop()
    if sides or side % PATCH_SIZE or side < minimum:
        raise ValueError("image size {} is not supported: {} takes squares of multiples of {} from {} up"
                         .format(img_size, family, PATCH_SIZE, minimum))
    return side


def register(model_class, name, variant, default_size, **cfg):
    """Registers with timm, under `name`, the models `model_class(**variant)` for images of `default_size` pixels.

    `cfg`: what the default configuration says beyond what all models share. The constructor and the configuration stand
    in the module of `model_class`, where timm looks for them.
    """
    module = sys.modules[model_class.__module__]
    cfg = dict(dict(url="", num_classes=1000, input_size=(3, default_size, default_size), pool_size=None,
                    interpolation="bicubic", fixed_input_size=True, mean=IMAGENET_MEAN, std=IMAGENET_STD), **cfg)
    vars(module).setdefault("default_cfgs", {})[name] = cfg

    def build(pretrained=False, num_classes=1000, distillation=True, drop_path_rate=None, img_size=None,
              features_only=False, out_indices=(0, 1, 2), **kwargs):
        for timm_only in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(timm_only, None)
        for option, value in _FIXED.items():
            if kwargs.pop(option, value) != value:
                raise ValueError("{} of {} is {} and cannot be changed".format(option, name, value))
        if pretrained:
            raise RuntimeError(
                "no weights of {} are published at a fixed address; build it without pretrained and load a file: "
                "model.load_state_dict(torch.load(FILE, map_location='cpu')['model'])".format(name))
        config = dict(variant, num_classes=num_classes, distillation=distillation, img_size=img_size or default_size)
        if drop_path_rate is not None:
            config["drop_path_rate"] = drop_path_rate
        model = model_class(**dict(config, **kwargs))
        model.default_cfg = model.pretrained_cfg = dict(
            cfg, architecture=name, num_classes=num_classes, input_size=(3, model.img_size, model.img_size))
        return feature_extractor(model, out_indices) if features_only else model

    build.__name__ = build.__qualname__ = name
    build.__module__ = module.__name__
    build.__doc__ = "{} at {} pixels; keyword arguments as {}'s.".format(name, default_size, model_class.__name__)
    setattr(module, name, register_model(build))
