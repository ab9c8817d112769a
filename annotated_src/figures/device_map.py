"""The road from a model's description to a file that runs without torch."""

from annotated_src.figures.model_map import svg_text
from annotated_src.figures.station_map import (
    BETWEEN,
    BOX_WIDTH,
    LEFT,
    RIGHT,
    Station,
    StationMap,
    line,
)


class DeviceMap(StationMap):
    """An SVG that a notebook displays; it takes the page's text colour.

    lit names stations, or "everything".

    Raises:
        ValueError: no such station.
    """

    road = "the road from a model's description to a device"
    height = 332
    columns = ("with torch, once", "on the device")
    stations = {
        "authoring": Station("write the model", LEFT, 36, "modules, no weights"),
        "mapping": Station("map the names", LEFT, 118, "float weights"),
        "quantizing": Station("quantise", LEFT, 200, "8 or 4 bits"),
        "exporting": Station("export", LEFT, 282, ""),
        "running": Station("prefill, decode", RIGHT, 200, "ids, without torch"),
    }
    down = (
        ("authoring", "mapping"),
        ("mapping", "quantizing"),
        ("quantizing", "exporting"),
    )

    def turns(self) -> list[str]:
        """Draw the file that goes to the device, and the checkpoint that comes in."""
        mapping, exporting, running = (
            self.stations[name].middle for name in ("mapping", "exporting", "running")
        )
        edge = LEFT + BOX_WIDTH
        return [
            line(
                f"M {edge} {exporting:g} H {BETWEEN:g} V {running:g} H {RIGHT}"
                " m -5 -4 l 5 4 l -5 4"
            ),
            line(f"M {RIGHT} {mapping:g} H {edge} m 5 -4 l -5 4 l 5 4"),
            svg_text(RIGHT + 8.0, mapping + 5, "someone's checkpoint", anchor="start"),
            svg_text(
                BETWEEN + 8, exporting + 5, "one file, two entries", anchor="start"
            ),
        ]
