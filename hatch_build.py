"""A wheel carries the shipped recipes and ZeRO files; in a clone they lie beside the package."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CarryData(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":  # an editable install reads them where they are
            build_data["force_include"] |= {name: f"endprompt/{name}" for name in ("recipes", "ds_configs")}
