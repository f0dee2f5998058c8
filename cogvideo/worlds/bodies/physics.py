"""Simulates a scene by rigid-body physics (PyBullet, without a display) and records every body at every frame.

The same scene gives the same states, bit for bit, whatever was simulated before it in the process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cogvideo.worlds.bodies.scene import FPS, GRAVITY, NUM_FRAMES, Body, Scene

STEPS_PER_FRAME = 30
FLOOR_FRICTION = 0.8
FLOOR_RESTITUTION = 0.9  # the engine multiplies it by the body's


@dataclass(frozen=True)
class States:
    """The state of every body at every frame, frame k at k / FPS seconds; arrays over (frames, bodies)."""

    position: np.ndarray
    """(frames, bodies, 3) metres, the centre of mass."""
    orientation: np.ndarray
    """(frames, bodies, 4) unit quaternions x, y, z, w."""
    velocity: np.ndarray
    """(frames, bodies, 3) metres per second."""
    spin: np.ndarray
    """(frames, bodies, 3) radians per second about the world's axes."""
    contact: np.ndarray
    """(frames, bodies, bodies + 1) bool: touched since the previous frame; the last column is the floor."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def first_contact(self, body: int, other: int) -> int | None:
        """The first frame by which two bodies have touched; for the floor, `other` is the number of bodies."""
        touched = np.flatnonzero(self.contact[:, body, other])
        return int(touched[0]) if len(touched) else None


def load_pybullet() -> Any:
    """Import PyBullet. Raises: ValueError that names the extra if it is not installed."""
    try:
        import pybullet
    except ImportError:
        raise ValueError(
            "the bodies world needs PyBullet, which is not installed; pip install -e '.[worlds]'"
        ) from None
    return pybullet


def simulate(scene: Scene, num_frames: int = NUM_FRAMES) -> States:
    """Run the physics of a scene for `num_frames` frames. Raises: ValueError if PyBullet is not installed."""
    bullet = load_pybullet()
    client = bullet.connect(bullet.DIRECT)
    try:
        return _simulate(bullet, client, scene, num_frames)
    finally:
        bullet.disconnect(client)


def _simulate(bullet: Any, client: int, scene: Scene, num_frames: int) -> States:
    bullet.setGravity(0, 0, -GRAVITY, physicsClientId=client)
    bullet.setPhysicsEngineParameter(
        fixedTimeStep=1 / (FPS * STEPS_PER_FRAME),
        numSolverIterations=50,
        deterministicOverlappingPairs=1,
        restitutionVelocityThreshold=0.2,
        physicsClientId=client,
    )
    floor = bullet.createMultiBody(0, bullet.createCollisionShape(bullet.GEOM_PLANE, physicsClientId=client))
    bullet.changeDynamics(
        floor, -1, lateralFriction=FLOOR_FRICTION, restitution=FLOOR_RESTITUTION, physicsClientId=client
    )
    handles = [_add(bullet, client, body) for body in scene.bodies]
    column = {handle: index for index, handle in enumerate([*handles, floor])}
    count = len(handles)
    states = States(
        position=np.zeros((num_frames, count, 3)),
        orientation=np.zeros((num_frames, count, 4)),
        velocity=np.zeros((num_frames, count, 3)),
        spin=np.zeros((num_frames, count, 3)),
        contact=np.zeros((num_frames, count, count + 1), bool),
    )
    for frame in range(num_frames):
        for _ in range(STEPS_PER_FRAME if frame else 0):
            bullet.stepSimulation(physicsClientId=client)
            for handle, index in zip(handles, range(count), strict=True):
                for point in bullet.getContactPoints(bodyA=handle, physicsClientId=client):
                    if point[8] <= 1e-3:  # metres apart: the engine lists pairs before they touch
                        states.contact[frame, index, column[point[2]]] = True
        for index, handle in enumerate(handles):
            position, orientation = bullet.getBasePositionAndOrientation(handle, physicsClientId=client)
            velocity, spin = bullet.getBaseVelocity(handle, physicsClientId=client)
            states.position[frame, index], states.orientation[frame, index] = position, orientation
            states.velocity[frame, index], states.spin[frame, index] = velocity, spin
    return states


def _add(bullet: Any, client: int, body: Body) -> int:
    if body.shape == "ball":
        shape = bullet.createCollisionShape(bullet.GEOM_SPHERE, radius=body.size[0], physicsClientId=client)
    elif body.shape == "box":
        shape = bullet.createCollisionShape(bullet.GEOM_BOX, halfExtents=body.size, physicsClientId=client)
    else:
        shape = bullet.createCollisionShape(
            bullet.GEOM_CYLINDER, radius=body.size[0], height=2 * body.size[2], physicsClientId=client
        )
    handle = bullet.createMultiBody(body.mass, shape, -1, body.position, body.orientation, physicsClientId=client)
    bullet.resetBaseVelocity(handle, body.velocity, body.spin, physicsClientId=client)
    bullet.changeDynamics(
        *(handle, -1),
        lateralFriction=body.friction,
        restitution=body.restitution,
        rollingFriction=0.0,
        spinningFriction=0.0,
        linearDamping=0.0,
        angularDamping=0.0,
        contactProcessingThreshold=0.0,
        activationState=bullet.ACTIVATION_STATE_DISABLE_SLEEPING,
        physicsClientId=client,
    )
    return int(handle)
