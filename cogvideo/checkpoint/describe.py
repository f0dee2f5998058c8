"""What a checkpoint of ours says it is, and whether its tensors agree; from headers, before a model is built."""

from cogvideo.checkpoint.format import CONFIG, Checkpoint
from cogvideo.checkpoint.sat.names import Kind, Sizes, expand, listed
from cogvideo.config import from_dict
from cogvideo.model.config import ModelConfig
from cogvideo.superres.config import SuperresConfig

Description = ModelConfig | SuperresConfig


def describe(checkpoint: Checkpoint) -> Description:
    """The config stored with a transformer. Raises: ValueError in one line."""
    where = str(checkpoint.directory / CONFIG)
    if "model" in checkpoint.config:
        return from_dict(ModelConfig, checkpoint.config["model"], origin=where)
    if "superres" in checkpoint.config:
        return from_dict(SuperresConfig, checkpoint.config["superres"], origin=where)
    raise ValueError(f"{where} describes no transformer, it has {listed(set(checkpoint.config)) or 'no settings'}")


def kind_of(config: Description) -> Kind:
    """Which structure of `names.PARAMETERS` a config describes."""
    if isinstance(config, SuperresConfig):
        return "direct_superres" if config.method == "direct" else "iterative_superres"
    return "video" if config.has_temporal_channel else "image"


def sizes_of(config: Description) -> Sizes:
    extra = config.high_res_side**2 if isinstance(config, SuperresConfig) else config.num_extra_positions
    return Sizes(config.num_layers, config.hidden_size, config.vocabulary.size, config.num_positions, extra)


def check_fits(checkpoint: Checkpoint, config: Description) -> None:
    """Compare the checkpoint's names and shapes with what the config asks for. Raises: ValueError in one line."""
    kind, sizes = kind_of(config), sizes_of(config)
    if not 0 <= config.num_layers <= len(checkpoint.names):
        raise ValueError(
            f"{checkpoint.directory} holds {len(checkpoint.names)} tensors, not num_layers={config.num_layers} layers; "
            "use the config that it was made with"
        )
    expected = {parameter.name: sizes.of(parameter) for parameter in expand(kind, config.num_layers)}
    missing, unexpected = expected.keys() - checkpoint.infos.keys(), checkpoint.infos.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.directory} does not fit a {kind} model of {config.num_layers} layers: "
            f"missing {listed(missing) or 'nothing'}; unexpected {listed(unexpected) or 'nothing'}"
        )
    for name, info in checkpoint.infos.items():
        if info.shape != expected[name] or not info.dtype.is_floating_point:
            raise ValueError(
                f"{checkpoint.directory} does not fit its config: {name} is {info}, expected {list(expected[name])}; "
                "use the config that it was made with"
            )
