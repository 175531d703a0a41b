"""Fast off-screen rendering of a MuJoCo model on a machine that may have no GPU.

With software rendering, a frame of Meta-World through gymnasium's renderer takes about 0.1 s. Nearly all of it
is shadows (a 4096 x 4096 depth map a frame), multisampling, reflections, and vertices, most of them of the robot's
CAD meshes. This renderer draws no shadows and no reflections, takes one sample a pixel, merges mesh vertices that lie
closer together than half a pixel, and draws round shapes with fewer faces. `benchmarks/bench_recording.py` measures
what that gains.
"""

from __future__ import annotations

import atexit
import ctypes.util
import glob
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

# Half the width in metres of what a camera with a field of view of 60 degrees sees at a distance of 1 m. Divided by
# the image size it is half a pixel there: 6 mm at 96 px, 2.6 mm at 224 px.
HALF_VIEW_M = 0.577
MIN_FACES_TO_SIMPLIFY = 1000  # the robot's CAD meshes have 2,371 to 13,510 faces, most objects below 500
_GL_REMEDY = (
    "Software rendering needs Debian's package libosmesa6 (apt-get install libosmesa6) and MUJOCO_GL=osmesa; "
    "with a GPU and its driver's EGL library use MUJOCO_GL=egl. MUJOCO_GL is read when mujoco is first "
    "imported, so set it before."
)


def set_default_gl() -> None:
    """Chooses MuJoCo's off-screen GL backend through the environment, unless the user has chosen one.

    ``MUJOCO_GL`` becomes "egl" where an NVIDIA device and an EGL library are present, else "osmesa" where
    that library is present, else "egl" where Mesa's software EGL may do. Outside Linux it is left alone.
    ``LP_NUM_THREADS=0`` makes Mesa rasterise in the calling thread, so that recording processes do not compete for
    cores. It costs little: most of the time goes to vertices, which Mesa handles in one thread anyway.

    MuJoCo reads the variable when it is imported, so this must run before ``import mujoco``.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if os.environ.get("MUJOCO_GL") or sys.platform != "linux":
        return
    has_egl = ctypes.util.find_library("EGL") is not None
    has_osmesa = ctypes.util.find_library("OSMesa") is not None
    has_gpu = bool(glob.glob("/dev/nvidia[0-9]*"))
    os.environ["MUJOCO_GL"] = "egl" if has_egl and (has_gpu or not has_osmesa) else "osmesa"


def import_mujoco() -> ModuleType:
    """Imports ``mujoco`` with the GL backend of :func:`set_default_gl`.

    Returns:
        The module.

    Raises:
        RuntimeError: the backend that MUJOCO_GL names cannot be loaded; names the package that mends it.
    """
    set_default_gl()
    try:
        import mujoco
    except ModuleNotFoundError:
        raise
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # PyOpenGL raises each of these
        raise RuntimeError(_gl_message(error)) from error
    return mujoco


def simplify_meshes(model: Any, tolerance: float) -> None:
    """Draws large meshes with fewer faces: changes the model's faces in place, by vertex clustering.

    Vertices are snapped to a grid of ``tolerance``, and each cell of the grid keeps one of them. Faces that
    collapse or coincide are dropped. Vertices, normals and collision geometry stay as they are, for only drawing
    (and ray casting) reads the faces. Method: Rossignac and Borrel 1993, "Multi-resolution 3D approximations for
    rendering complex scenes".

    Args:
        model: a ``mujoco.MjModel``; must not yet be used by a renderer, which copies the faces.
        tolerance: edge of a grid cell in metres.
    """
    for mesh in np.flatnonzero(model.mesh_facenum >= MIN_FACES_TO_SIMPLIFY):
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        cells = np.round(vertices / tolerance).astype(np.int64)
        _, representative, cell_of_vertex = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        faces = representative[cell_of_vertex.ravel()][model.mesh_face[start : start + count]]
        corners = np.sort(faces, axis=1)
        _, first_of_kind = np.unique(corners, axis=0, return_index=True)
        first_of_kind.sort()
        collapsed = (corners[:, 0] == corners[:, 1]) | (corners[:, 1] == corners[:, 2])
        kept = first_of_kind[~collapsed[first_of_kind]]
        model.mesh_face[start : start + len(kept)] = faces[kept]
        for per_face in (model.mesh_facenormal, model.mesh_facetexcoord):
            per_face[start : start + len(kept)] = per_face[start + kept]
        model.mesh_facenum[mesh] = len(kept)


class OffscreenRenderer:
    """Draws a MuJoCo model from its own cameras into square RGB images.

    Only one renderer of a process holds GL resources at a time. When another one draws, the first frees its
    resources, and creates them again (about 0.3 s) for its next image. This avoids a trap: destroying a GL context
    that is not current frees objects *of the context that is current*, and silently corrupts its images. For the
    same reason the garbage collector must never destroy a context: the class holds the renderer that is live, and
    closes it explicitly.
    """

    _live: OffscreenRenderer | None = None

    def __init__(
        self,
        model: Any,
        image_size: int,
        hide_sites: bool = False,
        *,
        hidden_geoms: Iterable[int] = (),
        plain: bool = False,
    ) -> None:
        """Prepares the model for drawing; GL resources are made at the first image.

        Args:
            model: ``mujoco.MjModel``; its visual settings and mesh faces are changed.
            image_size: height and width in pixels.
            hide_sites: leave out all sites (Meta-World marks goals with them).
            hidden_geoms: groups of geoms to leave out (robosuite's group 0 holds collision shapes).
            plain: draw the model as it is described, with shadows and reflections: slow, and what published pictures
                show.
        """
        self._mujoco = import_mujoco()
        self.model = model
        self.image_size = image_size
        self._plain = plain
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if not plain:
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
            model.vis.quality.numslices, model.vis.quality.numstacks = 16, 8  # of round shapes, instead of 28, 16
            simplify_meshes(model, tolerance=HALF_VIEW_M / image_size)
        self._options = self._mujoco.MjvOption()
        if hide_sites:
            self._options.sitegroup[:] = 0
        for group in hidden_geoms:
            self._options.geomgroup[group] = 0
        self._rectangle = self._mujoco.MjrRect(0, 0, image_size, image_size)
        self._gl: Any = None
        self._context: Any = None
        self._scene: Any = None

    def camera_names(self) -> list[str]:
        """The names of the model's cameras."""
        return [self.model.camera(index).name for index in range(self.model.ncam)]

    def render(self, data: Any, camera: str) -> np.ndarray:
        """Draws the scene as it is in ``data``.

        Args:
            data: ``mujoco.MjData`` with up-to-date kinematics.
            camera: name of a camera of the model.

        Returns:
            uint8 (image_size, image_size, 3), RGB, row 0 at the top. Fixed cameras of the world that are mounted
            upside down (Meta-World's corner cameras) are turned by 180 degrees, so that up is up. A camera on a robot
            may look anywhere, and is not turned.

        Raises:
            RuntimeError: no GL context can be made; names the package and the variable that mend it.
        """
        mujoco = self._mujoco
        if OffscreenRenderer._live is not self:
            self._open()
        index = self.model.camera(camera).id
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = index
        bottom_up = np.empty((self.image_size, self.image_size, 3), dtype=np.uint8)
        self._gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self._options, None, view, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(bottom_up, None, self._rectangle, self._context)
        in_world = self.model.cam_bodyid[index] == 0
        is_fixed = in_world and self.model.cam_mode[index] == mujoco.mjtCamLight.mjCAMLIGHT_FIXED
        up_z = data.cam_xmat[index, 7]  # z of the camera's y axis: where "up" in its image points to
        upside_down = is_fixed and up_z < 0
        # GL hands out the bottom row first, so an upside-down image has its rows in order already
        return np.ascontiguousarray(bottom_up[:, ::-1] if upside_down else bottom_up[::-1])

    def close(self) -> None:
        """Frees the GL resources, if this renderer holds them; a later `render` creates them again."""
        if OffscreenRenderer._live is not self:
            return
        OffscreenRenderer._live = None
        self._gl.make_current()
        self._context.free()  # must come first, and with its own GL context current
        self._gl.free()
        self._gl = self._context = self._scene = None

    def _open(self) -> None:
        if OffscreenRenderer._live is not None:
            OffscreenRenderer._live.close()
        mujoco = self._mujoco
        from OpenGL.error import Error as OpenGLError  # mujoco's own dependency, and slow to import

        try:
            self._gl = mujoco.GLContext(self.image_size, self.image_size)
            self._gl.make_current()
            self._context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except (mujoco.FatalError, OpenGLError, RuntimeError, AttributeError, OSError) as error:
            raise RuntimeError(_gl_message(error)) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(self.model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._plain
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = self._plain
        OffscreenRenderer._live = self
        atexit.unregister(_close_live_renderer)
        atexit.register(_close_live_renderer)  # after mujoco's own handler, so that it runs before that ends EGL


def _close_live_renderer() -> None:
    if OffscreenRenderer._live is not None:
        OffscreenRenderer._live.close()


def _gl_message(error: Exception) -> str:
    backend = os.environ.get("MUJOCO_GL", "")
    return f"MuJoCo cannot render off-screen with MUJOCO_GL={backend!r}: {error}. {_GL_REMEDY}"
